// A photograph and its card.

import { said, withdrawn } from "./answer.js";
import { capital, make, shown } from "./text.js";

let number = 0;

export class Photograph {
  /**
   * @param {File} file
   * @param {string} path of the file, as the browser tells it.
   * @param {object} model what /api/model says.
   * @param {object} page what can be asked of it: ask(photograph), explain(photograph, name),
   *   remove(photograph), all of them functions.
   */
  constructor(file, path, model, page) {
    Object.assign(this, { file, model, page, name: shown(path) });
    this.answer = null; // of the server
    this.error = ""; // why there is no answer
    this.metadata = {};
    this.url = URL.createObjectURL(file);
    this.heatMaps = new Map(); // their addresses by diagnosis
    this.build();
  }

  build() {
    number += 1;
    const title = `photograph-${number}`;
    this.image = make("img", {
      src: this.url, alt: `Photograph ${this.name}`, decoding: "async", loading: "lazy",
    });
    this.picture = make("div", { class: "picture" }, this.image);
    this.image.addEventListener("error", () => this.showNoPicture());
    const remove = make("button", { type: "button", class: "small" }, "Remove");
    remove.setAttribute("aria-label", `Remove ${this.name}`);
    remove.addEventListener("click", () => this.page.remove(this));
    this.text = make("div", { class: "text" });
    this.element = make(
      "article",
      { class: "card", "aria-labelledby": title, tabindex: "-1" },
      this.picture,
      make("div", { class: "top" }, make("h3", { id: title }, make("bdi", {}, this.name)), remove),
      this.text,
    );
    if (this.model.takes_metadata) this.element.append(this.fields());
    this.show("Waiting for its turn");
  }

  fields() {
    const choice = (label, key, values) => {
      const options = [make("option", { value: "" }, "not known")];
      options.push(...values.map((value) => make("option", { value }, value)));
      return this.field(label, key, make("select", {}, ...options));
    };
    const age = make("input", { type: "number", min: "0", max: "120", inputmode: "numeric" });
    return make(
      "fieldset",
      { class: "known" },
      make("legend", {}, "Where known"),
      this.field("Age in years", "age", age),
      choice("Sex", "sex", this.model.metadata.sex),
      choice("Site", "localization", this.model.metadata.localization),
    );
  }

  field(label, key, control) {
    control.addEventListener("change", () => {
      if (!control.reportValidity()) return;
      if (control.value === "") delete this.metadata[key];
      else this.metadata[key] = key === "age" ? Number(control.value) : control.value;
      this.page.ask(this);
    });
    return make("label", {}, label, control);
  }

  /** Says what goes on: of the first answer in its place, of a further one beside it. */
  show(progress) {
    this.element.classList.add("asked");
    this.element.setAttribute("aria-busy", "true");
    if (!this.answer) this.text.replaceChildren(make("p", { class: "quiet progress" }, progress));
  }

  /** Shows what the server answers. */
  take(answer) {
    if (answer.error) {
      this.fail(answer.error);
      return;
    }
    const wasOpen = this.text.querySelector(".withdrawn")?.open ?? false;
    this.answer = answer;
    this.error = "";
    this.heatMaps = new Map();
    this.showPhotograph();
    const elements = [...said(this.model, answer), this.heatMap()];
    this.settle(answer.unlike ? "unlike" : "", answer.unlike ? withdrawn(elements) : elements);
    if (wasOpen && answer.unlike) this.text.querySelector(".withdrawn").open = true;
  }

  /** Shows why there is no answer, and a way to ask again where that may help. */
  fail(error, again = false) {
    this.answer = null;
    this.error = capital(shown(error));
    const elements = [make("p", { class: "notice" }, make("b", {}, "No answer. "), this.error)];
    if (again) {
      const button = make("button", { type: "button" }, "Try again");
      button.addEventListener("click", () => {
        this.element.focus(); // the button goes
        this.page.ask(this);
      });
      elements.push(button);
    }
    this.settle("failed", elements);
  }

  settle(state, elements) {
    this.element.removeAttribute("aria-busy");
    this.element.className = `card ${state}`;
    this.text.replaceChildren(...elements);
  }

  heatMap() {
    const button = make("button", { type: "button", "aria-pressed": "false" }, "Heat map");
    const choice = make("select", {}, ...this.model.classes.map(({ name, title }) =>
      make("option", { value: name, selected: name === this.answer.prediction }, title)));
    const { heat_map_of: member } = this.model; // of an ensemble
    const places = member ? `Places that spoke, in ${shown(member)}, for` : "Places that spoke for";
    const label = make("label", { hidden: true }, places, choice);
    const trouble = make("p", { class: "quiet", role: "status" });
    const show = async () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      label.hidden = !isOn;
      trouble.textContent = "";
      if (!isOn) {
        this.showPhotograph();
        return;
      }
      const name = choice.value;
      trouble.textContent = "Drawing the heat map";
      const { address, error } = await this.explain(name);
      const isWanted = button.getAttribute("aria-pressed") === "true" && choice.value === name;
      if (!isWanted || !button.isConnected) return;
      trouble.textContent = error ?? "";
      if (error) button.setAttribute("aria-pressed", "false");
      else this.showHeat(address, choice.selectedOptions[0].text);
    };
    button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!isOn));
      show();
    });
    choice.addEventListener("change", show);
    return make("div", { class: "heat" }, button, label, trouble);
  }

  /** Returns the heat map's address for a diagnosis, or a sentence why there is none. */
  async explain(name) {
    const { heatMaps } = this; // a further answer brings others
    if (heatMaps.has(name)) return { address: heatMaps.get(name) };
    const found = await this.page.explain(this, name);
    if (found.address) heatMaps.set(name, found.address);
    return found;
  }

  showHeat(address, title) {
    this.image.src = address;
    this.image.alt = `Heat map over ${this.name}: the places that spoke for ${title}`;
    this.picture.replaceChildren(this.image);
  }

  showPhotograph() {
    if (this.image.src === this.url) return;
    this.image.src = this.url;
    this.image.alt = `Photograph ${this.name}`;
  }

  showNoPicture() {
    this.picture.replaceChildren(make("p", { class: "quiet" }, "This browser cannot show the file."));
  }

  /** Lets go of the picture. */
  close() {
    this.element.remove();
    URL.revokeObjectURL(this.url);
  }
}
