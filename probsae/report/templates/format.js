// Elements are made with textContent alone: no text of the run is ever parsed as HTML.
function make(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const byId = (id) => document.getElementById(id);

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(digits - 1).replace("e+", "e").replace(/\.?0*e/, "e");
  return String(Number(value.toPrecision(digits)));
}

const fraction = (value) => (value === null ? "–" : value.toFixed(2).replace(/^(-?)0\./, "$1."));
const probability = (value) => (value > 0.995 && value < 1 ? ">.99" : fraction(value));
const share = (value) => (value < 0.01 ? "<1%" : `${Math.round(100 * value)}%`);

// Controls would break a line, vanish, or turn the text behind them round: they are shown as signs.
const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
const CONTROLS = /[\p{Cc}\p{Zl}\p{Zp}\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]/gu;
const sign = (c) => SIGNS[c] || `⟨${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
const visible = (text) => text.replace(CONTROLS, sign) || "∅";
// Alone, a token's own spaces have to be seen.
const lone = (text) => visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
