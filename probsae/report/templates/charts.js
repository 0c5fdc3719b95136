const CONFIG = { displayModeBar: false, responsive: true };

function colours() {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(`--${name}`).trim();
  return { ink: read("ink"), muted: read("muted"), line: read("line"), accent: read("accent"), grey: read("grey"), warm: `rgb(${read("warm").replaceAll(" ", ",")})` };
}

function axis(title, more) {
  const c = colours();
  return { title: { text: title, font: { size: 11 }, standoff: 6 }, gridcolor: c.line, linecolor: c.line, zeroline: false, tickfont: { size: 11 }, automargin: true, ...more };
}

// Draw, with in words for those who do not see it.
function draw(id, traces, layout, words) {
  const node = byId(id);
  if (!node || !window.Plotly) return;
  node.setAttribute("aria-label", words);
  const base = {
    margin: { l: 48, r: 12, t: 6, b: 36 }, paper_bgcolor: "transparent", plot_bgcolor: "transparent",
    font: { family: "inherit", size: 11, color: colours().muted }, bargap: 0.06, showlegend: false,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, hoverlabel: { namelength: -1 },
  };
  Plotly.react(node, traces, { ...base, ...layout }, CONFIG);
}

const sum = (values) => values.reduce((a, b) => a + b, 0);

function drawHistogram(one) {
  const c = colours();
  const [low, high] = one.edges;
  const width = (high - low) / one.likely.length || 1;
  const x = one.likely.map((_, i) => low + (i + 0.5) * width);
  const bar = (y, name, color) => ({ type: "bar", x, y, name, width, marker: { color }, hovertemplate: `%{y} tokens at %{x:.3g}<extra>${name}</extra>` });
  draw(
    "chart-codes",
    [bar(one.likely, "p > .5", c.accent), bar(one.unlikely, `p ${fraction(FEATURES.kept)} to .5`, c.grey)],
    { barmode: "stack", showlegend: true, xaxis: axis("code E z"), yaxis: axis("tokens", { type: "log", dtick: 1 }), margin: { l: 44, r: 8, t: 22, b: 36 } },
    `Histogram of the codes: ${sum(one.likely)} tokens with p above .5, ${sum(one.unlikely)} below, from ${number(low)} to ${number(high)}`
  );
}

function drawRates() {
  const rates = FEATURES.columns.rate;
  const alive = Array.from({ length: N }, (_, i) => isAlive(i));
  const logs = (wanted) => rates.flatMap((r, i) => (alive[i] === wanted && r > 0 ? [Math.log10(r)] : []));
  const c = colours();
  const bar = (wanted, name, color) => ({ type: "histogram", x: logs(wanted), name, marker: { color }, xbins: { start: -8, end: 0, size: 0.1 } });
  draw(
    "chart-rates",
    [bar(true, "likely somewhere", c.accent), bar(false, "never likely", c.grey)],
    { barmode: "stack", showlegend: true, xaxis: axis("log10 rate"), yaxis: axis("features") },
    `Histogram of ${N} firing rates; ${alive.filter(Boolean).length} features are likely somewhere`
  );
}

function drawScatter(name) {
  const column = COLUMNS.find((one) => one.name === name);
  const y = FEATURES.columns[name];
  draw(
    "chart-scatter",
    [{ type: "scatter", mode: "markers", x: FEATURES.columns.rate, y, text: y.map((_, i) => `feature ${i}`), customdata: y.map((_, i) => i), marker: { size: 4, opacity: 0.55, color: colours().accent }, hovertemplate: "%{text}<br>rate %{x:.3g}<br>%{y:.3g}<extra></extra>" }],
    { xaxis: axis("rate", { type: "log" }), yaxis: axis(column.label), hovermode: "closest" },
    `Scatter plot of ${N} features: rate against ${column.label}`
  );
}

function drawGates() {
  const counts = FEATURES.p_active;
  const x = counts.map((_, i) => (i + 0.5) / counts.length);
  draw(
    "chart-p",
    [{ type: "bar", x, y: counts, marker: { color: colours().accent }, hovertemplate: "%{y} codes<extra></extra>" }],
    { xaxis: axis("p_active", { range: [0, 1] }), yaxis: axis("codes", { type: "log", dtick: 1 }) },
    `Histogram of p_active from ${FEATURES.kept} to 1 over ${sum(counts)} codes`
  );
}

const PARTS = [["elbo", "elbo, nats a token"], ["fvu", "fvu"], ["l0", "l0"]];

function drawHistory() {
  const history = DATA.history;
  const parts = PARTS.filter(([name]) => history[name]);
  const layout = { grid: { rows: 1, columns: parts.length, pattern: "independent", xgap: 0.25 } };
  const traces = parts.map(([name, title], i) => {
    const n = i ? i + 1 : "";
    layout[`xaxis${n}`] = axis("step", { nticks: 4 });
    layout[`yaxis${n}`] = axis(title, { nticks: 6 });
    return { x: history.step, y: history[name], xaxis: `x${n}`, yaxis: `y${n}`, mode: "lines", name, line: { color: colours().accent, width: 1.5 } };
  });
  draw("chart-history", traces, layout, `Course of ${parts.map(([name]) => name).join(", ")} by step`);
}

function drawReliability() {
  const c = colours();
  const palette = [c.accent, c.warm, "#8a63d2", "#c2477f", "#5a8f3c", "#7d7d7d"];
  const methods = Object.entries(DATA.reliability);
  const traces = methods.map(([name, bins], i) => ({
    x: bins.predicted, y: bins.observed, name, mode: "lines+markers",
    line: { color: palette[i % palette.length], width: 1.5 }, marker: { size: 6 },
    error_y: { type: "data", symmetric: false, thickness: 1, width: 2, array: bins.upper.map((u, j) => u - bins.observed[j]), arrayminus: bins.lower.map((l, j) => bins.observed[j] - l) },
    customdata: bins.count, hovertemplate: "stated %{x:.3f}<br>observed %{y:.3f}<br>%{customdata} codes",
  }));
  const diagonal = { x: [0, 1], y: [0, 1], mode: "lines", name: "calibrated", line: { color: c.muted, dash: "dot", width: 1 }, hoverinfo: "skip" };
  draw(
    "chart-reliability", [diagonal, ...traces],
    { showlegend: true, xaxis: axis("p_active, as stated", { range: [0, 1] }), yaxis: axis("share that is truly active", { range: [0, 1.02] }) },
    `Reliability diagram of ${methods.map(([name]) => name).join(", ")}`
  );
}
