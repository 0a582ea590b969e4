// The page: photographs in, a card each; asks the server in batches, one at a time.

import { asCsv, asPage } from "./keep.js";
import { Photograph } from "./photograph.js";
import { count, make, shown } from "./text.js";

const BATCH = 8; // photographs a request, so that first answers come early
const TRIES = 10; // of a request while the server is busy
const BUSY = [429, 503];
const PAUSE_MS = 2000;

const ORDER = new Intl.Collator("en", { numeric: true });

const at = (id) => document.getElementById(id);
const wait = (time) => new Promise((done) => setTimeout(done, time));

class Refusal extends Error {
  constructor(sentence, status = 0) {
    super(sentence);
    this.status = status; // of HTTP; 0 where the server was not reached
  }
}

/** Returns what the server answers; waits where it is busy. */
async function request(path, options = {}) {
  for (let tries = 1; ; tries += 1) {
    let response;
    try {
      response = await fetch(path, options);
    } catch {
      throw new Refusal("The server does not answer. Start it again, then try again.");
    }
    const content = await response.json().catch(() => ({}));
    if (response.ok) return content;
    if (!BUSY.includes(response.status) || tries === TRIES) {
      const sentence = content.error ?? `The server refused this with status ${response.status}.`;
      throw new Refusal(sentence, response.status);
    }
    await wait(1000 * Number(response.headers.get("Retry-After")) || PAUSE_MS);
  }
}

class Page {
  constructor(model) {
    this.model = model;
    this.photographs = [];
    this.queue = []; // photographs to ask for
    this.asked = []; // photographs that the server has now
    this.leftOut = 0; // files of folders that are no photographs
  }

  /** Adds files, and asks for them. */
  add(found, leftOut = 0) {
    found.sort((one, other) => ORDER.compare(one.path, other.path)); // a folder has no order
    const fresh = found.map(({ file, path }) => new Photograph(file, path, this.model, this));
    this.photographs.push(...fresh);
    at("cards").append(...fresh.map((photograph) => photograph.element));
    this.fit();
    this.leftOut += leftOut;
    for (const photograph of fresh) this.enqueue(photograph);
    this.tell(this.summary());
    this.work();
  }

  ask(photograph) {
    this.enqueue(photograph);
    this.work();
  }

  enqueue(photograph) {
    const { max_bytes: most } = this.model.limits;
    if (photograph.file.size > most) {
      const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
      photograph.fail(`It has ${megabytes(photograph.file.size)}; at most ${megabytes(most)} are`
        + " taken. Save it smaller.");
      return;
    }
    photograph.show("Waiting for its turn");
    if (!this.queue.includes(photograph)) this.queue.push(photograph);
  }

  remove(photograph) {
    const place = this.photographs.indexOf(photograph);
    this.photographs.splice(place, 1);
    this.queue = this.queue.filter((other) => other !== photograph);
    photograph.close();
    const next = this.photographs[Math.min(place, this.photographs.length - 1)];
    this.fit();
    (next?.element ?? at("choose")).focus();
    this.tell(`${photograph.name} removed.`);
  }

  clear() {
    for (const photograph of this.photographs) photograph.close();
    this.photographs = [];
    this.queue = [];
    this.leftOut = 0;
    this.fit();
    at("choose").focus();
    this.tell("All photographs removed.");
  }

  /** Asks for all that waits, unless that is going on already. */
  async work() {
    if (this.asked.length) return;
    for (let batch = this.next(); batch.length; batch = this.next()) {
      this.asked = batch;
      for (const photograph of batch) photograph.show("The network is looking at it");
      if (!this.watched) this.watch();
      await this.answer(batch);
      this.asked = [];
      if (this.photographs.length) this.tell(this.summary());
    }
  }

  next() {
    const { max_files: files, max_request_bytes: bytes } = this.model.limits;
    let size = 0;
    const fits = ({ file }, place) => place < Math.min(BATCH, files) && (size += file.size) <= bytes;
    const end = this.queue.findIndex((photograph, place) => !fits(photograph, place));
    return this.queue.splice(0, end < 0 ? this.queue.length : end);
  }

  async answer(batch) {
    try {
      const answers = await this.predict(batch);
      batch.forEach((photograph, place) => photograph.take(answers[place]));
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      const { status, message } = refusal;
      if (batch.length > 1 && status && !BUSY.includes(status)) {
        for (const one of batch) await this.answer([one]); // it may be for one of them alone
      } else {
        for (const one of batch) one.fail(message, !status || BUSY.includes(status));
      }
    }
  }

  async predict(batch, query = "") {
    const body = new FormData();
    for (const { file } of batch) {
      await file.slice(0, 1).arrayBuffer().catch(() => {
        throw new Refusal("It can no longer be read from its place. Add it again.", 422);
      });
      body.append("photograph", file);
    }
    if (this.model.takes_metadata) {
      body.append("metadata", JSON.stringify(batch.map(({ metadata }) => metadata)));
    }
    return (await request(`api/predict${query}`, { method: "POST", body })).answers;
  }

  /** Returns the address of a heat map, or a sentence why there is none. */
  async explain(photograph, name) {
    try {
      const query = `?${new URLSearchParams({ explain: 1, class: name })}`;
      const [answer] = await this.predict([photograph], query);
      return answer.heat_map ? { address: answer.heat_map } : { error: shown(answer.error) };
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) throw refusal;
      return { error: refusal.message };
    }
  }

  /** Says how long it will take, as long as it does. */
  async watch() {
    this.watched = true;
    while (this.asked.length) {
      await wait(PAUSE_MS / 2);
      const { waiting, seconds } = await request("api/queue").catch(() => ({ waiting: 0 }));
      const more = waiting ? (seconds / waiting) * this.queue.length : 0;
      const length = Math.ceil(seconds + more);
      at("queue").textContent = this.asked.length && waiting && length
        ? `${count(waiting + this.queue.length, "photograph")} to go, about`
          + ` ${count(length, "second")}` : "";
    }
    at("queue").textContent = "";
    this.watched = false;
  }

  summary() {
    const number = (test) => this.photographs.filter(test).length;
    const parts = [
      [number(({ answer }) => answer?.flagged && !answer.unlike), "flagged as possibly malignant"],
      [number(({ answer }) => answer?.unlike), "unlike the photographs of training"],
      [number(({ error }) => error), "without an answer"],
      [this.leftOut, "left out, as other kinds of files"],
    ].filter(([some]) => some).map(([some, words]) => `${some} ${words}`);
    const waiting = this.queue.length ? `, ${this.queue.length} waiting` : "";
    const done = `${number(({ answer }) => answer)} of ${count(this.photographs.length, "photograph")}`;
    return `${done} answered${waiting}.${parts.length ? ` ${parts.join(", ")}.` : ""}`;
  }

  fit() {
    at("answers").classList.toggle("empty", !this.photographs.length);
  }

  tell(sentence) {
    at("status").textContent = sentence;
  }

  save(content, type, name) {
    const url = URL.createObjectURL(new Blob([content], { type }));
    make("a", { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), PAUSE_MS);
    this.tell(`Saved as ${name}.`);
  }
}

const ACCEPTED = at("files").accept.split(",").filter((kind) => kind.startsWith("."));

function isPhotograph({ name, type }) {
  return !name.startsWith(".") && (type.startsWith("image/")
    || ACCEPTED.some((suffix) => name.toLowerCase().endsWith(suffix)));
}

/** Yields files and folders that were dropped as {file, path}; null for what cannot be read. */
async function* walk(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed)).catch(() => null);
    yield file && { file, path: entry.fullPath.slice(1) };
    return;
  }
  const reader = entry.createReader();
  for (;;) { // a reader gives a hundred at a time
    const some = await new Promise((done) => reader.readEntries(done, () => done([])));
    if (!some.length) return;
    for (const one of some) yield* walk(one);
  }
}

async function addDropped(page, transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const found = [];
  let leftOut = 0;
  for (const entry of entries) {
    for await (const one of walk(entry)) {
      if (one && (entry.isFile || isPhotograph(one.file))) found.push(one);
      else leftOut += 1;
    }
  }
  if (found.length || leftOut) page.add(found, leftOut);
}

function connectInputs(page) {
  for (const [button, input] of [["choose", "files"], ["choose-folder", "folder"], ["take", "camera"]]) {
    at(button).addEventListener("click", () => at(input).click());
    at(input).addEventListener("change", ({ target }) => {
      const all = [...target.files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
      const found = input === "folder" ? all.filter(({ file }) => isPhotograph(file)) : all;
      target.value = ""; // so that the same can be chosen again
      page.add(found, all.length - found.length);
    });
  }
  let depth = 0; // of elements that the pointer is over
  const drag = (change) => (event) => {
    event.preventDefault();
    depth = Math.max(0, depth + change);
    document.body.classList.toggle("dragged", depth > 0);
  };
  addEventListener("dragenter", drag(1));
  addEventListener("dragleave", drag(-1));
  addEventListener("dragover", drag(0));
  addEventListener("drop", (event) => {
    drag(-depth)(event);
    addDropped(page, event.dataTransfer);
  });
}

function connectButtons(page) {
  at("save-csv").addEventListener("click", () => {
    page.save(`\ufeff${asCsv(page.photographs, page.model)}`, "text/csv", "answers.csv");
  });
  at("save-html").addEventListener("click", async () => {
    page.save(await asPage(page.photographs, page.model), "text/html", "answers.html");
  });
  at("clear").addEventListener("click", () => page.clear());
}

function connectDialogs() {
  for (const name of ["card", "limits"]) {
    at(`open-${name}`).addEventListener("click", () => at(name).showModal());
  }
  for (const link of at("card").querySelectorAll("a[href^=http]")) link.target = "_blank";
  for (const [place, table] of at("card").querySelectorAll("table").entries()) {
    const label = `Table ${place + 1} of the model card`;
    const frame = make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": label });
    table.replaceWith(frame);
    frame.append(table);
  }
}

connectDialogs();
try {
  const page = new Page(await request("api/model"));
  connectInputs(page);
  connectButtons(page);
} catch (refusal) {
  if (!(refusal instanceof Refusal)) throw refusal;
  at("status").textContent = refusal.message;
}
