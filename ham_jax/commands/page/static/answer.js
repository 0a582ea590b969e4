// What is said of a photograph, as elements; the page and the saved page show the same.

import { capital, make, percent } from "./text.js";

const LEAST = 0.005; // probability that gets a bar

export const UNLIKE = "Unlike the photographs of training";

/** Returns the classes of a model by name. */
export function byName(model) {
  return new Map(model.classes.map((one) => [one.name, one]));
}

function diagnosis(model, name) {
  const { title, malignant } = byName(model).get(name);
  const tag = malignant ? make("span", { class: "tag" }, "(malignant)") : null;
  return make("span", {}, title, tag && " ", tag);
}

/** Returns the class and the probability of a diagnosis, the most probable first. */
export function ranked(answer) {
  return Object.entries(answer.probabilities).sort((one, other) => other[1] - one[1]);
}

function headline(model, answer) {
  return make(
    "p",
    { class: "diagnosis" },
    make("b", {}, capital(byName(model).get(answer.prediction).title)),
    make("span", {}, percent(answer.probabilities[answer.prediction])),
  );
}

function flag(answer) {
  if (answer.flagged === null) return null;
  const share = percent(answer.malignancy).replace("<", "below").replace(">", "above");
  const sum = `Together, the malignant diagnoses have a probability ${/^\d/.test(share) ? "of " : ""}${share}`;
  return answer.flagged
    ? make("p", { class: "flag flagged" }, make("b", {}, "Flagged as possibly malignant."), ` ${sum}.`)
    : make("p", { class: "flag" }, make("b", {}, "Not flagged as malignant."),
        ` ${sum}, which does not rule them out.`);
}

function bar(model, [name, probability]) {
  const line = make("span", { class: "bar", "aria-hidden": "true" });
  line.style.setProperty("--share", `${(100 * probability).toFixed(1)}%`);
  const { malignant } = byName(model).get(name);
  return make("li", malignant ? { class: "malignant" } : {}, diagnosis(model, name),
    make("span", {}, percent(probability)), line);
}

/** Returns bars; what is too improbable for one is named below them. */
function bars(model, answer) {
  const label = model.has_calibration ? "Calibrated probabilities" : "Uncalibrated probabilities";
  const all = ranked(answer);
  const some = all.filter(([, probability]) => probability >= LEAST);
  const rest = all.slice(some.length).map(([name]) => byName(model).get(name).title);
  return [
    make("ul", { class: "bars", "aria-label": label }, ...some.map((pair) => bar(model, pair))),
    rest.length ? make("p", { class: "quiet" }, `Less than 1\u00a0% each: ${rest.join(", ")}`) : null,
  ];
}

/** Returns what the prediction set holds, the most probable first; null where there is no set. */
export function members(model, answer) {
  if (answer.prediction_set === null) return null;
  const names = ranked(answer).map(([name]) => name);
  const held = names.filter((name) => answer.prediction_set.includes(name));
  if (!held.length) return ["empty, as no diagnosis is probable enough"];
  return held.flatMap((name, place) => [place ? ", " : "", diagnosis(model, name)]);
}

function set(model, answer) {
  const held = members(model, answer);
  return held && make("p", { class: "set" }, make("b", {}, `Set for ${percent(model.level)}: `), ...held);
}

/** Returns elements with all that is said of a photograph, but for the heat map. */
export function said(model, answer) {
  return [headline(model, answer), flag(answer), ...bars(model, answer), set(model, answer)].filter(
    (element) => element !== null,
  );
}

/** Returns elements that lead with a picture's strangeness and withdraw what is said of it. */
export function withdrawn(elements) {
  return [
    make(
      "div",
      { class: "notice" },
      make("p", {}, make("b", {}, UNLIKE)),
      make("p", {}, "The network was not trained on pictures like this one. Do not rely on what it"
        + " says of it."),
    ),
    make("details", { class: "withdrawn" },
      make("summary", {}, "Show the answer nevertheless"), ...elements),
  ];
}
