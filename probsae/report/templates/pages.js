const PAGES = ["features", "overview", "comparison"];
const drawn = new Set();

function drawPage(name) {
  if (name === "overview" && FEATURES) {
    drawRates();
    drawScatter(byId("against").value);
    drawGates();
  }
  if (name === "overview" && DATA.history.step) drawHistory();
  if (name === "comparison" && Object.keys(DATA.reliability).length) drawReliability();
  drawn.add(name);
}

function open(name, isFocused) {
  for (const page of PAGES) {
    const tab = byId(`tab-${page}`);
    tab.setAttribute("aria-selected", page === name);
    tab.tabIndex = page === name ? 0 : -1;
    byId(`page-${page}`).hidden = page !== name;
  }
  if (isFocused) byId(`tab-${name}`).focus();
  drawPage(name);
}

function openFeature(feature) {
  open("features");
  select(feature);
  byId("grid").focus();
}

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = name === "dark" ? "Light" : "Dark";
  byId("theme").setAttribute("aria-label", `Switch to ${name === "dark" ? "light" : "dark"} colours`);
  if (codes.view && !isEmpty(example(list.selected))) drawCodes(example(list.selected), true);
  for (const page of drawn) if (!byId(`page-${page}`).hidden) drawPage(page);
}

function startTabs() {
  PAGES.forEach((page, i) => {
    byId(`tab-${page}`).addEventListener("click", () => open(page));
    byId(`tab-${page}`).addEventListener("keydown", ({ key }) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (step) open(PAGES[(i + step + PAGES.length) % PAGES.length], true);
    });
  });
}

function startKeys() {
  document.addEventListener("keydown", (event) => {
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (event.key === "/" && !isTyping && !byId("page-features").hidden) {
      event.preventDefault();
      byId("query").focus();
    }
    if (event.key === "Escape") byId("grid").focus();
  });
}

function openAddress() {
  const feature = Number(/^#f(\d+)$/.exec(location.hash)?.[1] ?? NaN);
  if (feature < N) select(feature);
  return feature < N;
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  byId("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  startTabs();
  open(FEATURES ? "features" : "comparison");
  if (!FEATURES) return;
  startKeys();
  byId("against").append(...COLUMNS.filter(({ name }) => name !== "rate").map(({ name, label }) => make("option", { value: name }, label)));
  byId("against").addEventListener("input", () => drawScatter(byId("against").value));
  startGrid();
  if (!openAddress() && list.order.length) select(list.order[0]);
  addEventListener("hashchange", openAddress);
}

start();
performance.mark("ready");
