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

// Controls would break a line or vanish: they are shown as signs.
const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
const visible = (text) => text.replace(/[\n\r\t]/g, (c) => SIGNS[c]) || "∅";
// Alone, a token's own spaces have to be seen.
const lone = (text) => visible(text).replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
