// The list of features: only the rows in view exist, so that its length costs nothing.
const ROW = 26;
const HEAD = 30;
const EXTRA = 10;
const list = { order: [], by: "rate", isDescending: true, selected: null };

const lowest = () => Math.floor(Math.log10(Math.min(1e-3, ...FEATURES.columns.rate_lower.filter((r) => r > 0), 1)));
let decades = 5;
const place = (rate) => `${100 * Math.min(1, Math.max(0, 1 + Math.log10(Math.max(rate, 1e-12)) / decades))}%`;

function forest(feature) {
  const [low, rate, high] = ["rate_lower", "rate", "rate_upper"].map((name) => place(value(name, feature)));
  const bar = make("i");
  bar.style.left = low;
  bar.style.right = `calc(100% - ${high})`;
  const dot = make("b");
  dot.style.left = rate;
  return make("span", { role: "gridcell", class: "forest", "--decade": `${100 / decades}%`, "aria-label": `interval ${number(value("rate_lower", feature))} to ${number(value("rate_upper", feature))}` }, bar, dot);
}

function line(position) {
  const feature = list.order[position];
  const preview = FEATURES.text ? commonTokens(feature).slice(0, 4).map(lone).join("  ") : "";
  const node = make(
    "div", { role: "row", class: "row", id: `row-${feature}`, "aria-rowindex": position + 2, "aria-selected": feature === list.selected, onclick: () => select(feature) },
    make("span", { role: "gridcell", class: "number" }, String(feature)),
    FEATURES.text ? make("span", { role: "gridcell" }, preview) : null,
    forest(feature),
    ...COLUMNS.map(({ name, format }) => make("span", { role: "gridcell", class: "number" }, format(value(name, feature))))
  );
  node.style.top = `${position * ROW}px`;
  return node;
}

function paintRows() {
  const grid = byId("grid");
  const first = Math.max(0, Math.floor(grid.scrollTop / ROW) - EXTRA);
  const end = Math.min(list.order.length, Math.ceil((grid.scrollTop + grid.clientHeight) / ROW) + EXTRA);
  byId("rows").replaceChildren(...Array.from({ length: Math.max(0, end - first) }, (_, i) => line(first + i)));
  const isShown = list.order.slice(first, end).includes(list.selected);
  if (isShown) grid.setAttribute("aria-activedescendant", `row-${list.selected}`);
  else grid.removeAttribute("aria-activedescendant");
}

function heading(name, label, title, isNumber) {
  const sort = list.by === name ? (list.isDescending ? "descending" : "ascending") : "none";
  const button = make("button", { type: "button", title, onclick: () => sortBy(name) }, label);
  return make("span", { role: "columnheader", "aria-sort": sort, class: isNumber ? "number" : null }, button);
}

function paintHead() {
  const level = Math.round(100 * FEATURES.level);
  byId("head").replaceChildren(
    heading("index", "feature", "Row of the dictionary", true),
    ...(FEATURES.text ? [make("span", { role: "columnheader", class: "hint" }, "fires on")] : []),
    make("span", { role: "columnheader", class: "hint", title: `${level}% interval of the rate, ${FEATURES.interval.meaning}; log scale from 1e-${decades} to 1` }, `rate, ${level}%`),
    ...COLUMNS.map(({ name, label, title }) => heading(name, label, title, true))
  );
}

function matches(feature, query) {
  if (!query) return true;
  if (/^#?\d+$/.test(query) && String(feature) === query.replace("#", "")) return true;
  if (!FEATURES.text) return false;
  return commonTokens(feature).some((text) => text.toLowerCase().includes(query)) ||
    effects(feature).some(([text]) => text.toLowerCase().includes(query));
}

const SHOWN = { all: () => true, alive: isAlive, never: (feature) => !isAlive(feature) };

function refreshList() {
  const query = byId("query").value.toLowerCase();
  const isShown = SHOWN[byId("show").value];
  const key = list.by === "index" ? (i) => i : (i) => value(list.by, i) ?? (list.isDescending ? -Infinity : Infinity);
  const sign = list.isDescending ? -1 : 1;
  list.order = Array.from({ length: N }, (_, i) => i)
    .filter((feature) => isShown(feature) && matches(feature, query))
    .sort((a, b) => sign * (key(a) - key(b)) || a - b);
  byId("rows").style.height = `${list.order.length * ROW}px`;
  byId("grid").setAttribute("aria-rowcount", list.order.length + 1);
  byId("count").textContent = `${list.order.length.toLocaleString("en")} of ${N.toLocaleString("en")}`;
  byId("grid").scrollTop = 0;
  paintHead();
  paintRows();
}

function sortBy(name) {
  list.isDescending = list.by === name ? !list.isDescending : name !== "index";
  list.by = name;
  refreshList();
}

function select(feature) {
  list.selected = feature;
  const position = list.order.indexOf(feature);
  if (position >= 0) reveal(position);
  paintRows();
  showDetail(feature);
  history.replaceState(null, "", `#f${feature}`);
}

function reveal(position) {
  const grid = byId("grid");
  const top = position * ROW;
  const height = grid.clientHeight - HEAD;
  if (top < grid.scrollTop) grid.scrollTop = top;
  if (top + ROW > grid.scrollTop + height) grid.scrollTop = top + ROW - height;
}

function move(event) {
  const page = Math.max(1, Math.floor((byId("grid").clientHeight - HEAD) / ROW) - 1);
  const last = list.order.length - 1;
  const at = list.order.indexOf(list.selected);
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: last }[event.key];
  if (event.key === "Enter" && event.target === byId("grid")) byId("detail-title")?.focus();
  if (next === undefined || last < 0) return;
  event.preventDefault();
  select(list.order[Math.min(last, Math.max(0, next))]);
}

function startGrid() {
  decades = -lowest();
  const wide = (pixels) => `minmax(${pixels}px, 1fr)`;
  // A heading in bold takes some 7 pixels a letter.
  const numbers = COLUMNS.map(({ label }) => Math.max(52, 7.2 * label.length));
  const widths = ["48px", ...(FEATURES.text ? [wide(90)] : []), wide(72), ...numbers.map((pixels) => `${pixels}px`)];
  byId("grid").style.setProperty("--grid-columns", widths.join(" "));
  const needed = 48 + (FEATURES.text ? 90 : 0) + 72 + sum(numbers) + 8 * (widths.length - 1) + 20;
  byId("page-features").style.setProperty("--grid-width", `${needed}px`);
  byId("grid").setAttribute("aria-colcount", widths.length);
  byId("grid").addEventListener("keydown", move);
  byId("grid").addEventListener("scroll", paintRows, { passive: true });
  byId("query").addEventListener("input", refreshList);
  byId("show").addEventListener("input", refreshList);
  new ResizeObserver(paintRows).observe(byId("grid"));
  refreshList();
}
