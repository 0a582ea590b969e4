// Elements, and texts from outside as mere texts: as ham_jax/escape.py shows and writes them.

const HIDDEN = /(?![\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}]/gu;
const SHORT = { "\n": "\\n", "\r": "\\r", "\t": "\\t" };
const FORMULA = /^['\s]*[=+\-@\t\r\n＝＋－＠]/;
const NUMBER = /^[+-]?(\p{Nd}+\.?\p{Nd}*|\.\p{Nd}+)([eE][+-]?\p{Nd}+)?$/u;

/** Returns an element: `make("p", { class: "quiet" }, "text", otherElement)`. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Returns a text as one line of visible characters; all others become escapes. */
export function shown(text) {
  return String(text).replace(HIDDEN, (character) => {
    const code = character.codePointAt(0);
    const hex = (digits) => code.toString(16).padStart(digits, "0");
    if (code > 0xffff) return `\\U${hex(8)}`;
    return SHORT[character] ?? (code < 0x80 ? `\\x${hex(2)}` : `\\u${hex(4)}`);
  });
}

/** Returns rows as CSV, in which no text is a formula to a spreadsheet. */
export function csv(rows) {
  const cell = (value) => {
    let text = String(value);
    if (FORMULA.test(text) && !NUMBER.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\n`).join("");
}

/** Returns a probability in per cent; never 0 or 100. */
export function percent(share) {
  if (share < 0.005) return "<\u00a01\u00a0%";
  return share >= 0.995 ? ">\u00a099\u00a0%" : `${Math.round(100 * share)}\u00a0%`;
}

/** Returns `1 photograph`, `2 photographs`. */
export function count(number, word) {
  return `${number} ${word}${number === 1 ? "" : "s"}`;
}

/** Returns a sentence's beginning. */
export function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
