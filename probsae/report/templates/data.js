const DATA = JSON.parse(byId("data").textContent);
const FEATURES = DATA.features;
const N = FEATURES ? FEATURES.columns.rate.length : 0;

const pairs = (flat) => Array.from({ length: flat.length / 2 }, (_, i) => [flat[2 * i], flat[2 * i + 1]]);
const tokenText = (row) => FEATURES.text.strings[FEATURES.text.index[row]];

function example(feature) {
  const [top, undecided, [rows, mean, scale, perMille], tokens, edges, likely, unlikely] =
    FEATURES.examples[feature];
  const codes = new Map(
    rows.map((row, i) => [row, { mean: mean[i], scale: scale[i], p: perMille[i] / 1000 }])
  );
  return { top, undecided, codes, tokens: pairs(tokens), edges, likely, unlikely };
}

// First and last row of the window around a row, inside its context.
function windowOf(row) {
  const { starts, index } = FEATURES.text;
  let low = 0;
  let high = starts.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= row) low = middle;
    else high = middle;
  }
  const end = low + 1 < starts.length ? starts[low + 1] : index.length;
  return [Math.max(starts[low], row - FEATURES.window), Math.min(end, row + FEATURES.window + 1)];
}

const isAlive = (feature) => FEATURES.examples[feature][5].some((count) => count > 0);
const commonTokens = (feature) =>
  pairs(FEATURES.examples[feature][3]).map(([index]) => FEATURES.text.strings[index]);
const effects = (feature) => (FEATURES.effects ? pairs(FEATURES.effects[feature]) : []);

// What the list can be sorted by, as far as the run has it.
const COLUMNS = [
  { name: "rate", label: "rate", format: (x) => number(x, 2), title: "Expected share of tokens on which the feature is active, mean p_active" },
  { name: "undecided", label: "undecided", format: fraction, title: "Share of its activity that is uncertain, sum p(1 − p) / sum p; 0 is decided" },
  { name: "direction_variance", label: "direction", format: (x) => number(x, 2), title: "Expected 1 − cosine with the true direction; lower is surer" },
  { name: "p_real", label: "real", format: fraction, title: "Probability that the data have this feature" },
  { name: "stability", label: "stability", format: fraction, title: "Does it come back in other fits? Higher is better" },
  { name: "largest", label: "largest", format: number, title: "Largest code, units of the activations" },
].filter((column) => FEATURES && FEATURES.columns[column.name]);
const value = (name, feature) => FEATURES.columns[name][feature];
