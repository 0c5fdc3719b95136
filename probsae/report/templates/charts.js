// Figures by Vega-Lite; its expressions are interpreted (`ast`), for the page forbids eval.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: read("ink"), muted: read("muted"), line: read("line"), accent: read("accent"), grey: read("grey"), warm: `rgb(${read("warm").replaceAll(" ", ",")})` };
}

function config() {
  const c = colours();
  const text = { labelColor: c.muted, titleColor: c.muted, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11 };
  return {
    background: "transparent", font: getComputedStyle(document.body).fontFamily, aria: false,
    view: { stroke: null },
    axis: { ...text, gridColor: c.line, domainColor: c.line, tickColor: c.line, titlePadding: 6, labelOverlap: true },
    legend: { ...text, orient: "top", title: null, symbolType: "square", symbolOpacity: 1, offset: 4 },
    bar: { color: c.accent }, point: { color: c.accent, filled: true }, line: { color: c.accent, strokeWidth: 1.5 },
  };
}

// Draw into a node, with words for those who do not see it.
async function draw(node, words, spec, renderer = "svg") {
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", words);
  const full = { width: "container", height: "container", autosize: { type: "fit", contains: "padding" }, config: config(), ...spec };
  const theme = document.documentElement.dataset.theme;
  // A node of its own: Vega gives it another role and label.
  const inner = make("div", { class: "fill", "aria-hidden": "true" });
  node.replaceChildren(inner);
  const { view } = await vegaEmbed(inner, full, { ast: true, actions: false, defaultStyle: false, renderer, tooltip: { theme } });
  return view;
}

const sum = (values) => values.reduce((a, b) => a + b, 0);
const quantity = (field, title, more) => ({ field, type: "quantitative", title, ...more });
// On a log axis a bar stands on .7, so that a count of 1 has a height.
const count = { ...quantity("n", null, { stack: null, scale: { type: "log", domainMin: 0.7 }, axis: { tickCount: 4, format: "~s", grid: false } }) };
const floor = { datum: 0.7 };
const kinds = (names, range) => ({ field: "kind", type: "nominal", scale: { domain: names, range } });
const tip = (field, title, format = ".3~g") => ({ field, title, format, type: "quantitative" });

const CODE_KINDS = () => ["p > .5", `p ${fraction(FEATURES.kept)} to .5`];
const codes = { node: make("div", { id: "chart-codes", class: "chart" }), view: null };

function codeBars(one) {
  const [low, high] = one.edges;
  const width = (high - low) / one.likely.length || 1;
  const bars = (counts, kind) => counts.flatMap((n, i) => (n ? [{ x: low + i * width, end: low + (i + 1) * width, n, kind }] : []));
  const [likely, unlikely] = CODE_KINDS();
  return [...bars(one.unlikely, unlikely), ...bars(one.likely, likely)];
}

function codesSpec(values) {
  const c = colours();
  return {
    data: { name: "bars", values }, mark: { type: "bar", opacity: 0.9 },
    encoding: {
      x: quantity("x", "code E z", { bin: { binned: true }, scale: { zero: true, nice: false }, axis: { tickCount: 6, format: "~r", grid: false } }), x2: { field: "end" },
      y: { ...count, title: "tokens" }, y2: floor,
      color: kinds(CODE_KINDS(), [c.accent, c.grey]),
      tooltip: [tip("n", "tokens", ","), tip("x", "from"), tip("end", "to"), { field: "kind" }],
    },
  };
}

const codeWords = (one) =>
  `Histogram of the codes: ${sum(one.likely)} tokens with p above .5, ${sum(one.unlikely)} below, from ${number(one.edges[0])} to ${number(one.edges[1])}`;

// The figure of the feature on show; its node outlives features, so that a change is quick.
async function drawCodes(one, isNew) {
  if (isNew || !codes.view) {
    codes.view = await draw(codes.node, codeWords(one), codesSpec(codeBars(one)));
    return;
  }
  codes.node.setAttribute("aria-label", codeWords(one));
  await codes.view.data("bars", codeBars(one)).runAsync();
}

const rateAxis = () => quantity(null, "rate", { scale: { type: "log" }, axis: { tickCount: 6, format: "~g", grid: false } });

function drawRates() {
  const c = colours();
  const names = ["likely somewhere", "never likely"];
  // Ten bins a decade.
  const values = FEATURES.columns.rate.flatMap((rate, i) => {
    const bin = Math.floor(10 * Math.log10(rate));
    return rate > 0 ? [{ x: 10 ** (bin / 10), end: 10 ** ((bin + 1) / 10), kind: names[isAlive(i) ? 0 : 1] }] : [];
  });
  const isKnown = ({ kind }) => kind === names[0];
  return draw(byId("chart-rates"), `Histogram of ${N} firing rates; ${values.filter(isKnown).length} features are likely somewhere`, {
    data: { values }, mark: { type: "bar", binSpacing: 1 },
    encoding: {
      x: { ...rateAxis(), field: "x" }, x2: { field: "end" },
      y: { aggregate: "count", type: "quantitative", title: "features", axis: { tickCount: 5 } }, color: kinds(names, [c.accent, c.grey]),
    },
  });
}

async function drawScatter(name) {
  const column = COLUMNS.find((one) => one.name === name);
  const values = FEATURES.columns.rate.flatMap((rate, feature) => {
    const y = value(name, feature);
    return rate > 0 && y !== null ? [{ feature, rate, y }] : [];
  });
  const view = await draw(byId("chart-scatter"), `Scatter plot of ${values.length} features: rate against ${column.label}`, {
    data: { values }, mark: { type: "circle", size: 14, opacity: 0.5, cursor: "pointer", color: colours().accent },
    encoding: {
      x: { ...rateAxis(), field: "rate" },
      y: quantity("y", column.label, { scale: { zero: false } }),
      tooltip: [tip("feature", "feature", "d"), tip("rate", "rate"), tip("y", column.label)],
    },
  }, "canvas");
  view.addEventListener("click", (_, item) => item?.datum && openFeature(item.datum.feature));
}

function drawGates() {
  const n = FEATURES.p_active.length;
  const values = FEATURES.p_active.flatMap((count, i) => (count ? [{ x: i / n, end: (i + 1) / n, n: count }] : []));
  return draw(byId("chart-p"), `Histogram of p_active from ${FEATURES.kept} to 1 over ${sum(FEATURES.p_active)} codes`, {
    data: { values }, mark: "bar",
    encoding: {
      x: quantity("x", "p_active", { bin: { binned: true }, scale: { domain: [0, 1] }, axis: { grid: false, tickCount: 10, format: "~r" } }), x2: { field: "end" },
      y: { ...count, title: "codes" }, y2: floor, tooltip: [tip("n", "codes", ","), tip("x", "from"), tip("end", "to")],
    },
  });
}

const PARTS = [["elbo", "elbo, nats a token"], ["fvu", "fvu"], ["l0", "l0"]];

function drawHistory() {
  const run = DATA.history;
  const parts = PARTS.filter(([name]) => run[name]);
  const nodes = parts.map(() => make("div", { class: "chart" }));
  byId("chart-history").replaceChildren(...nodes);
  return Promise.all(parts.map(([name, title], i) => draw(nodes[i], `${title} by step, last ${number(run[name].at(-1), 4)}`, {
    data: { values: run.step.map((step, j) => ({ step, y: run[name][j] })) }, mark: "line",
    encoding: { x: quantity("step", "step", { axis: { grid: false, tickCount: 4 } }), y: quantity("y", title, { scale: { zero: false }, axis: { tickCount: 5 } }) },
  })));
}

function drawReliability() {
  const c = colours();
  const methods = Object.keys(DATA.reliability);
  const values = Object.entries(DATA.reliability).flatMap(([kind, bins]) =>
    bins.predicted.map((x, i) => ({ kind, x, y: bins.observed[i], lower: bins.lower[i], upper: bins.upper[i], n: bins.count[i] })));
  const x = quantity("x", "p_active, as stated", { scale: { domain: [0, 1] }, axis: { tickCount: 6, format: "~r" } });
  const color = { ...kinds(methods, [c.accent, c.warm, "#8a63d2", "#c2477f", "#5a8f3c", c.muted]), legend: { orient: "right", symbolType: "circle" } };
  const shown = (mark, y, more) => ({ mark, encoding: { x, y: quantity(y, "share that is truly active", { scale: { domain: [0, 1] }, axis: { tickCount: 6, format: "~r" } }), color, ...more } });
  const tooltip = [{ field: "kind", title: "method" }, tip("x", "stated"), tip("y", "observed"), tip("n", "codes", ",")];
  return draw(byId("chart-reliability"), `Reliability diagram of ${methods.join(", ")}`, {
    data: { values },
    layer: [
      { data: { values: [{ x: 0, y: 0 }, { x: 1, y: 1 }] }, mark: { type: "line", strokeDash: [3, 3], color: c.muted, strokeWidth: 1 }, encoding: { x, y: quantity("y") } },
      shown({ type: "rule", opacity: 0.7 }, "lower", { y2: { field: "upper" } }),
      shown("line", "y"),
      shown({ type: "point", size: 40 }, "y", { tooltip }),
    ],
  });
}
