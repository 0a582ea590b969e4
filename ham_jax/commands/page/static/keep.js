// All answers as files to keep: a CSV like that of --mode=predict, and a page that needs no network.

import { byName, members, ranked, said, withdrawn } from "./answer.js";
import { capital, csv, make, percent, shown } from "./text.js";

const FORM = { dateStyle: "long", timeStyle: "short" };
const SIDE = 240; // pixels of the longer side of a picture in the saved page
const POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'";

/** Returns the answers as CSV, in the columns of predict.csv, and what was known beside them. */
export function asCsv(photographs, model) {
  const names = model.classes.map((one) => one.name);
  const isTaken = names.some((name) => name.toLowerCase() === "malignant");
  const between = names.some((name) => name.includes(" ")) ? "; " : " ";
  const given = model.takes_metadata ? ["age", "sex", "localization"] : [];
  const yes = (value) => (value ? "yes" : "no");
  const decisions = ({ malignancy, flagged, prediction_set: held, ood_score: score, unlike }) => [
    ...malignancy === null ? ["", ""] : [malignancy.toFixed(6), yes(flagged)],
    held === null ? "" : held.join(between) || "empty",
    ...score === null ? ["", ""] : [Number(score.toPrecision(6)), yes(unlike)],
  ];
  const header = ["path", "prediction", ...names, isTaken ? "any_malignant" : "malignant",
    "malignant_flag", "prediction_set", "ood_score", "ood", ...given, "error", "note"];
  const rows = photographs.map(({ name, answer, error, metadata }, place) => {
    const said = answer
      ? [answer.prediction, ...names.map((one) => answer.probabilities[one].toFixed(6)),
        ...decisions(answer)]
      : Array(names.length + 6).fill("");
    const note = place ? "" : [model.disclaimer, model.sets_note ?? ""].join(" ").trim();
    const why = answer ? "" : error || "not yet answered";
    return [name, ...said, ...given.map((key) => metadata[key] ?? ""), why, note];
  });
  return csv([header, ...rows]);
}

/** Returns the answers as one HTML file, with small pictures in it. */
export async function asPage(photographs, model) {
  const style = await (await fetch("static/style.css")).text();
  const rows = [];
  for (const photograph of photographs) rows.push(await row(photograph, model));
  const head = ["Photograph", "Diagnosis", "Malignant", `Set for ${percent(model.level)}`,
    "Probabilities"].map((text) => make("th", { scope: "col" }, text));
  const title = `Answers of ${shown(model.name)}`;
  const body = make(
    "body",
    { class: "kept" },
    make("header", {}, make("div", {}, make("h1", {}, title),
      make("p", {}, `${new Date().toLocaleString("en-GB", FORM)}, ham_jax ${model.version}`))),
    make("main", {},
      make("p", { class: "notice" }, make("b", {}, model.disclaimer),
        " This is not a medical device. If you are worried about a mole, see a doctor."),
      model.sets_note && make("p", {}, model.sets_note),
      make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "All answers" },
        make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)))),
  );
  return `<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">`
    + `<meta name="viewport" content="width=device-width, initial-scale=1">`
    + `<meta name="color-scheme" content="light dark">`
    + `<meta http-equiv="Content-Security-Policy" content="${POLICY}">`
    + `${make("title", {}, title).outerHTML}<style>\n${style}</style></head>\n`
    + `${body.outerHTML}</html>\n`;
}

async function row(photograph, model) {
  const { name, answer, error, metadata } = photograph;
  const known = Object.values(metadata).join(", ");
  const picture = await small(photograph);
  const first = make("th", { scope: "row" },
    picture && make("img", { src: picture, alt: "" }),
    make("bdi", {}, name),
    known ? make("span", { class: "quiet" }, ` (${known})`) : null);
  const wide = (...children) => make("tr", {}, first, make("td", { colspan: "4" }, ...children));
  if (!answer) return wide(make("p", {}, make("b", {}, "No answer. "), error || "Not yet answered."));
  if (answer.unlike) return wide(...withdrawn(said(model, answer)));
  const titles = byName(model);
  const { title } = titles.get(answer.prediction);
  const probability = (one) => `\u00a0${percent(answer.probabilities[one])}`;
  const flag = answer.flagged === null ? ["no flag"] : [
    make("b", answer.flagged ? { class: "warned" } : {}, answer.flagged ? "flagged" : "not flagged"),
    `, ${percent(answer.malignancy)}`];
  return make(
    "tr", {}, first,
    make("td", {}, make("b", {}, capital(title)), probability(answer.prediction)),
    make("td", {}, ...flag),
    make("td", {}, ...members(model, answer) ?? ["no set"]),
    make("td", {}, ranked(answer).map(([one]) => titles.get(one).title + probability(one)).join("; ")),
  );
}

/** Returns a small copy of a picture as a data URL; null where the browser cannot show it. */
async function small({ file }) {
  let whole;
  try {
    whole = await createImageBitmap(file);
  } catch {
    return null; // such as HEIC, DICOM or a broken file
  }
  const scale = Math.min(1, SIDE / Math.max(whole.width, whole.height));
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(scale * whole.width));
  canvas.height = Math.max(1, Math.round(scale * whole.height));
  canvas.getContext("2d").drawImage(whole, 0, 0, canvas.width, canvas.height);
  whole.close();
  return canvas.toDataURL("image/jpeg", 0.8);
}
