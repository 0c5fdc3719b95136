function stat(name, text, more, title) {
  return make("div", { title }, make("dt", {}, name), make("dd", {}, text, more ? make("small", {}, ` ${more}`) : null));
}

// The interval of a figure that has one, and what it is of.
function intervalOf(name, feature) {
  const [lower, upper, source] = {
    rate: ["rate_lower", "rate_upper", FEATURES.interval],
    direction_variance: ["direction_lower", "direction_upper", null],
  }[name] ?? [];
  if (!lower || !FEATURES.columns[lower]) return [null, ""];
  const level = `${Math.round(100 * FEATURES.level)}%${source ? `, ${source.tokens}` : ""}`;
  const digits = source ? undefined : 2;
  const [low, high] = [lower, upper].map((column) => number(value(column, feature), digits));
  return [`${low} to ${high} (${level})`, source ? `. Its interval is ${source.meaning}` : ""];
}

function stats(feature) {
  return make(
    "dl", { class: "stats" },
    ...COLUMNS.map(({ name, label, format, title }) => {
      const [interval, meaning] = intervalOf(name, feature);
      return stat(label, format(value(name, feature)), interval, title + meaning);
    })
  );
}

function token(row, code, size, isPeak) {
  const classes = `token${code ? " on" : ""}${isPeak ? " peak" : ""}`;
  const title = code ? `E z ${number(code.mean)} ± ${number(code.scale)}, p_active ${probability(code.p)}` : null;
  const heat = code ? Math.min(1, Math.abs(code.mean) / size) : null;
  return make(isPeak ? "mark" : "span", { class: classes, title, "--z": heat, "--p": code ? code.p : null }, visible(tokenText(row)));
}

function kwic(row, one, size) {
  const [first, end] = windowOf(row);
  const run = (from, to) => Array.from({ length: to - from }, (_, i) => token(from + i, one.codes.get(from + i), size));
  return make(
    "span", { class: "kwic" },
    make("span", { class: "before" }, ...run(first, row)),
    make("span", {}, token(row, one.codes.get(row), size, true)),
    make("span", { class: "after" }, ...run(row + 1, end))
  );
}

function exampleLine(row, one, size) {
  const code = one.codes.get(row);
  const text = FEATURES.text
    ? kwic(row, one, size)
    : make("span", { class: "token", "--z": Math.abs(code.mean) / size }, `token ${row.toLocaleString("en")}`);
  return make(
    "li", {},
    make("span", { class: "number" }, `${number(code.mean)} ± ${number(code.scale, 2)}`),
    make("span", { class: "number hint" }, `p ${probability(code.p)}`),
    text
  );
}

function exampleList(title, rows, one, size, nothing, legend = null) {
  const lines = rows.map((row) => exampleLine(row, one, size));
  return make(
    "section", {}, legend, make("h3", {}, title),
    make("ul", { class: "examples" }, ...(lines.length ? lines : [make("li", { class: "nothing" }, nothing)]))
  );
}

function legend() {
  if (!FEATURES.text) return null;
  return make("span", { class: "legend" }, make("span", { class: "swatch" }), " E z   ", make("span", { class: "underline" }), " p_active, full length is 1");
}

function panel(title, content) {
  return content && make("section", {}, make("h3", {}, title), content);
}

function chips(items) {
  return make("ul", { class: "chips" }, ...items.map((item) => make("li", {}, ...[item].flat())));
}

function tokensPanel(one) {
  if (!one.tokens.length) return null;
  return chips(one.tokens.map(([index, part]) =>
    [lone(FEATURES.text.strings[index]), make("span", { class: "hint" }, ` ${share(part)}`)]));
}

function nearestPanel(feature) {
  return chips(pairs(FEATURES.nearest[feature]).map(([other, cosine]) =>
    make("button", { type: "button", onclick: () => select(other), "aria-label": `feature ${other}, cosine ${fraction(cosine)}` },
      `${other} `, make("span", { class: "hint" }, fraction(cosine)))));
}

function effectsPanel(feature) {
  const all = effects(feature).sort((a, b) => b[1] - a[1]);
  if (!all.length) return null;
  const list = (items) => make("ul", {}, ...items.map(([text, change]) =>
    make("li", {}, make("span", {}, lone(text)), make("span", { class: "number hint" }, (change > 0 ? "+" : "") + number(change)))));
  return make("div", { class: "effects" },
    list(all.filter(([, change]) => change > 0)), list(all.filter(([, change]) => change <= 0).reverse()));
}

const isEmpty = (one) => sum(one.likely) + sum(one.unlikely) === 0;

function showDetail(feature) {
  const one = example(feature);
  const size = Math.abs(value("largest", feature)) || 1;
  byId("detail").replaceChildren(
    make("h2", { id: "detail-title", tabindex: "-1" }, `Feature ${feature}`),
    stats(feature),
    exampleList("Strongest tokens", one.top, one, size, "Not active on any token.", legend()),
    exampleList("Where it is undecided", one.undecided, one, size, "No token apart from those above has p_active between .2 and .8."),
    make("div", { class: "panels" },
      panel("Codes", isEmpty(one) ? make("p", { class: "hint" }, `None with p_active above ${fraction(FEATURES.kept)}.`) : codes.node),
      make("div", {}, panel("Fires on", tokensPanel(one)), panel("Nearest features, by cosine", nearestPanel(feature))),
      panel("Effect on logits", effectsPanel(feature)))
  );
  byId("detail").scrollTop = 0;
  if (!isEmpty(one)) drawCodes(one);
}
