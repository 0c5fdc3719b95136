"""The page in Chromium, used as a person uses it: keyboard, mouse, light and dark, offline."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

import probsae as ps
from probsae.report import Page, gather_features, token_text, write_browser
from tests.report.chromium import chromium
from tests.report.planted import Planted, planted_activations, store_of
from tests.report.wicked import WICKED, wicked_page

pytestmark = pytest.mark.slow

N_TOKENS, D_IN = 1600, 60
WORDS = [" sea", " whale", " ship", "\n", " captain", " the", " of", ","]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    x = planted_activations(N_TOKENS, D_IN)
    ids = torch.arange(N_TOKENS) % len(WORDS)
    store = store_of(tmp_path_factory.mktemp("planted") / "store", x, ids)
    text = token_text(store, decode=lambda ids: [WORDS[i] for i in ids])
    stability = torch.linspace(0, 1, D_IN).roll(7)
    effects = [[(" harpoon" if i == 5 else " oar", 2.0), (" land", -1.0)] for i in range(D_IN)]
    return gather_features(Planted(D_IN), x, text=text, stability=stability, logit_effects=effects)


@pytest.fixture(scope="module")
def address(tmp_path_factory, features):
    path = tmp_path_factory.mktemp("page") / "page.html"
    page = dataclasses.replace(wicked_page(), title="Planted", features=features)
    return write_browser(page, path).as_uri()


@pytest.fixture
def visit(browser):
    """Open an address; at the end nothing may have been asked of the network or gone wrong."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    requests, errors = [], []
    context.on("request", lambda request: requests.append(request.url))
    context.on("weberror", lambda error: errors.append(str(error.error)))
    context.on("console", lambda message: errors.append(message.text))

    def open_page(address, **options):
        tab = context.new_page()
        if options:
            tab.emulate_media(**options)
        tab.goto(address, wait_until="load")
        return tab

    yield open_page
    context.close()
    assert errors == []
    # Vega draws what it exports as data: addresses; nothing else but the file itself.
    assert not [url for url in requests if not url.startswith(("file:", "data:"))]


def rows(tab):
    return [int(text) for text in tab.locator("#rows .row > :first-child").all_inner_texts()]


def selected(tab):
    return int(tab.inner_text("#detail-title").removeprefix("Feature "))


def test_rows_are_sorted_by_rate_at_first(visit, address, features):
    tab = visit(address)
    order = np.argsort(-features.columns.rate, kind="stable")
    # Three digits are in the page: ties there are broken by number.
    shown = features.columns.rate[rows(tab)]
    assert (np.diff(shown) <= 5e-3 * shown[:-1]).all()
    assert selected(tab) == order[0]
    assert tab.get_attribute("#grid", "aria-rowcount") == str(D_IN + 1)


@pytest.mark.parametrize("name", ["undecided", "stability", "largest"])
def test_headings_sort_down_and_up(visit, address, features, name):
    tab = visit(address)
    heading = tab.locator("[role=columnheader]", has_text=name)
    values = getattr(features.columns, name)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    down = values[rows(tab)]
    assert (np.diff(down) <= 5e-3 * np.abs(down[:-1])).all()
    assert down[0] == pytest.approx(values.max(), rel=5e-3)
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert values[rows(tab)[0]] == pytest.approx(values.min(), rel=5e-3)


class Known:
    """A posterior of the dictionary, as far as the page shows it."""

    direction_variance = torch.linspace(1e-4, 0.2, D_IN)
    log_odds_real = torch.linspace(-5, 5, D_IN)

    def rate_interval(self, level):
        return torch.full((D_IN,), 0.01), torch.full((D_IN,), 0.09)

    def direction_interval(self, level):
        return 0.8 * self.direction_variance, 1.3 * self.direction_variance


@pytest.fixture(scope="module")
def with_posterior(tmp_path_factory, features):
    """The page with every column that there is."""
    data = gather_features(
        Planted(D_IN), planted_activations(N_TOKENS, D_IN), text=features.text,
        posterior=Known(), stability=features.columns.stability,
        logit_effects=[[(" irresponsibly", 1.234), (" unaccountable", -0.987)]] * D_IN,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("known") / "page.html"
    return write_browser(Page("Known", features=data), path).as_uri()


def test_all_columns_are_in_view_and_headings_whole(visit, with_posterior):
    tab = visit(with_posterior)
    names = ["rate", "undecided", "direction", "real", "stability", "largest"]
    fits = "e => e.scrollWidth <= e.clientWidth"
    headings = tab.locator("[role=columnheader] button")
    assert headings.all_inner_texts() == ["feature", *names]
    for i in range(headings.count()):
        headings.nth(i).click()
        assert headings.nth(i).evaluate(fits)  # in bold
        assert tab.locator("#grid").evaluate(fits)
    assert tab.locator("#detail").evaluate(fits)
    assert tab.locator(".effects").evaluate(fits)
    assert tab.locator(".stats dt").all_inner_texts() == names
    assert "0.01 to 0.09 (90%, tokens of the posterior)" in tab.inner_text(".stats")
    title = tab.locator("[role=columnheader]", has_text="rate, 90%").get_attribute("title")
    assert title.startswith("90% interval of the rate, of the tokens that the dictionary's")
    variance = float(Known.direction_variance[selected(tab)])
    shown = tab.locator(".stats div", has_text="direction").locator("dd").inner_text()
    expected, low, high = (float(shown.split()[i]) for i in (0, 1, 3))
    figures = [variance, 0.8 * variance, 1.3 * variance]
    assert [expected, low, high] == pytest.approx(figures, rel=0.06)  # two digits
    assert shown.endswith("(90%)")


def test_numbers_stand_beside_their_text(visit, address):
    """Also where a context begins with the token, so that nothing is before it."""
    tab = visit(address)
    middle = "e => { const r = e.getBoundingClientRect(); return r.top + r.height / 2 }"
    n_first = 0
    for feature in range(8):
        tab.evaluate(f"location.hash = '#f{feature}'")
        tab.wait_for_selector(f"#detail-title:text-is('Feature {feature}')")
        for line in tab.locator(".examples li:not(.nothing)").all():
            n_first += line.locator(".before .token").count() == 0
            number = line.locator(".number").first.evaluate(middle)
            assert line.locator("mark").evaluate(middle) == pytest.approx(number, abs=2)
    assert n_first


def test_search_by_number_token_and_effect(visit, address):
    tab = visit(address)
    tab.fill("#query", "17")
    assert rows(tab) == [17]
    tab.fill("#query", "harpoon")
    assert rows(tab) == [5]
    tab.fill("#query", "WHALE")
    assert len(rows(tab)) > 1
    tab.fill("#query", "no such token")
    assert rows(tab) == []
    assert tab.inner_text("#count") == f"0 of {D_IN}"


def test_never_likely_features_can_be_hidden(visit, tmp_path):
    x = planted_activations(300, 8)
    x[:, 3] = -9
    data = gather_features(Planted(8), x)
    tab = visit(write_browser(Page("t", features=data), tmp_path / "p.html").as_uri())
    tab.select_option("#show", "never")
    assert rows(tab) == [3]
    tab.select_option("#show", "alive")
    assert sorted(rows(tab)) == [0, 1, 2, 4, 5, 6, 7]
    tab.select_option("#show", "all")
    tab.fill("#query", "3")
    tab.locator("#row-3").click()
    assert "Not active on any token." in tab.inner_text("#detail")


def test_keyboard_alone(visit, address):
    tab = visit(address)
    order = rows(tab)
    tab.keyboard.press("Tab")
    focus = "() => document.activeElement.id"
    for _ in range(20):
        if tab.evaluate(focus) == "grid":
            break
        outline = tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", tab.evaluate(focus)
        tab.keyboard.press("Tab")
    assert tab.evaluate(focus) == "grid"
    assert tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") != "none"
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowUp")
    assert selected(tab) == order[1]
    assert tab.get_attribute("#grid", "aria-activedescendant") == f"row-{order[1]}"
    assert tab.locator("#rows [aria-selected=true]").count() == 1
    tab.keyboard.press("End")
    last = selected(tab)
    assert tab.locator(f"#row-{last}").is_visible()
    assert tab.locator(f"#row-{last}").get_attribute("aria-rowindex") == str(D_IN + 1)
    tab.keyboard.press("Enter")
    assert tab.evaluate(focus) == "detail-title"
    tab.keyboard.press("Escape")
    tab.keyboard.press("Home")
    assert selected(tab) == order[0]
    tab.keyboard.press("/")
    assert tab.evaluate(focus) == "query"
    tab.keyboard.type("harpoon")
    tab.keyboard.press("Escape")
    tab.keyboard.press("ArrowDown")
    assert selected(tab) == 5


def test_tabs_by_arrow_keys(visit, address):
    tab = visit(address)
    tab.focus("#tab-features")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("() => document.activeElement.id") == "tab-overview"
    assert tab.locator("#page-overview").is_visible()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("ArrowLeft")
    assert tab.locator("#page-comparison").is_visible()
    assert tab.locator("[role=tab][aria-selected=true]").count() == 1


def test_tokens_are_coloured_by_code_and_underlined_by_p_active(visit, address, features):
    tab = visit(f"{address}#f11")
    assert selected(tab) == 11
    x = planted_activations(N_TOKENS, D_IN)
    post = Planted(D_IN).encode(x)
    one, peaks = features.examples[11], tab.locator("#detail section:has(.legend) mark")
    assert peaks.count() == len(one.top)
    for i, row in enumerate(one.top):
        style = peaks.nth(i).get_attribute("style")
        z, p = (float(re.search(rf"--{name}: ([\d.]+)", style)[1]) for name in "zp")
        assert z == pytest.approx(float(post.mean[row, 11] / post.mean[:, 11].max()), rel=0.02)
        assert p == pytest.approx(float(post.p_active[row, 11]), abs=1e-3)
        assert peaks.nth(i).text_content() == WORDS[row % len(WORDS)].replace("\n", "⏎")
    rate, lower, upper = (
        getattr(features.columns, n)[11] for n in ("rate", "rate_lower", "rate_upper")
    )
    numbers = [float(n) for n in re.findall(r"[\d.]+", tab.inner_text(".stats div:first-child"))]
    assert numbers[:3] == pytest.approx([rate, lower, upper], rel=0.03)
    colours = {
        tab.locator(".token").nth(i).evaluate("e => getComputedStyle(e).backgroundColor")
        for i in range(30)
    }
    assert len(colours) > 2  # fmt: skip


def test_a_nearest_feature_is_one_click_away(visit, address, features):
    tab = visit(f"{address}#f3")
    other = features.nearest[3][2][0]
    tab.get_by_role("button", name=f"feature {other}, cosine").click()
    assert selected(tab) == other
    assert tab.evaluate("() => location.hash") == f"#f{other}"


def test_the_histogram_follows_the_feature(visit, address, features):
    tab = visit(f"{address}#f0")
    bars = "#chart-codes .mark-rect.role-mark path"
    for feature in (0, 1):
        one = features.examples[feature]
        n_bars = np.count_nonzero(one.likely) + np.count_nonzero(one.unlikely)
        tab.wait_for_function(f"document.querySelectorAll('{bars}').length === {n_bars}")
        label = tab.get_attribute("#chart-codes", "aria-label")
        assert f"{sum(one.likely)} tokens with p above .5, {sum(one.unlikely)} below" in label
        tab.evaluate(f"location.hash = '#f{feature + 1}'")


def test_figures_of_the_overview_and_the_calibration(visit, address):
    tab = visit(address)
    tab.click("#tab-overview")
    tab.wait_for_selector("#chart-scatter canvas")
    tab.wait_for_selector("#chart-rates svg path")
    tab.wait_for_selector("#chart-p svg path")
    tab.wait_for_function("document.querySelectorAll('#chart-history svg').length === 3")
    tab.select_option("#against", "stability")
    tab.wait_for_selector("#chart-scatter[aria-label*=stability]")
    tab.click("#tab-comparison")
    # Ten bins, each with its interval.
    tab.wait_for_function(
        "document.querySelectorAll('#chart-reliability .mark-rule.role-mark line').length === 10"
    )
    assert tab.locator("caption").is_visible()


def test_a_click_on_the_scatter_plot_opens_the_feature(visit, address):
    tab = visit(f"{address}#f0")
    tab.click("#tab-overview")
    tab.wait_for_selector("#chart-scatter canvas")
    box = tab.locator("#chart-scatter canvas").bounding_box()
    for y in range(20, int(box["height"]) - 30, 4):
        for x in range(40, int(box["width"]), 4):
            tab.mouse.click(box["x"] + x, box["y"] + y)
            if tab.locator("#page-features").is_visible():
                assert 0 <= selected(tab) < D_IN
                return
    pytest.fail("no point answered a click")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_accessibility_violation(visit, address, scheme):
    tab = visit(address, color_scheme=scheme)
    tab.wait_for_selector("#chart-codes svg")
    assert tab.evaluate("() => document.documentElement.dataset.theme") == scheme
    for page in ("features", "overview", "comparison"):
        tab.click(f"#tab-{page}")
        result = Axe().run(tab)
        assert result.violations_count == 0, result.generate_report()


def test_dark_by_choice_and_back(visit, address):
    tab = visit(address)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(ground)
    tab.click("#theme")
    dark = tab.evaluate(ground)
    assert (
        sum(map(int, re.findall(r"\d+", light)))
        > 600
        > 150
        > sum(map(int, re.findall(r"\d+", dark)))
    )
    tab.click("#theme")
    assert tab.evaluate(ground) == light


def test_wicked_text_is_shown_and_does_nothing(visit, tmp_path):
    tab = visit(write_browser(wicked_page(), tmp_path / "wicked.html").as_uri())
    for name in ("features", "overview", "comparison"):
        tab.click(f"#tab-{name}")
    tab.click("#tab-features")
    for _ in range(12):
        tab.keyboard.press("ArrowDown")
    assert tab.evaluate("() => window.pwned") is None
    assert tab.locator("img, main style").count() == 0
    assert tab.inner_text("h1") == WICKED[1]
    shown = set(tab.locator("#detail .token").all_text_contents())
    assert set(WICKED[:8]) <= shown
    # What would vanish, or turn the text behind it round, is a sign.
    assert {"⟨2028⟩⟨2029⟩⟨202E⟩", "⟨0000⟩⏎⇥"} <= shown


def test_an_injected_script_could_not_run(browser, tmp_path):
    path = write_browser(Page("t"), tmp_path / "p.html")
    injected = "<script>document.title = 'pwned'</script><img src='http://localhost/x'><footer>"
    path.write_text(path.read_text().replace("<footer>", injected))
    messages = []
    tab = browser.new_page()
    tab.on("console", lambda message: messages.append(message.text))
    tab.goto(path.as_uri(), wait_until="load")
    assert tab.title() == "t"
    assert len(messages) == 2
    assert all("Content Security Policy" in message for message in messages)
    tab.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """4,096 features, each with some 32 codes on text."""
    model = ps.TopKSAE(d_in=64, d_sae=4096, k=32)
    x = torch.randn(4096, 64)
    store = store_of(tmp_path_factory.mktemp("large") / "s", x, torch.arange(4096) % 997, 128)
    text = token_text(store, decode=lambda ids: [f" word{i}" for i in ids])
    data = gather_features(model, x, text=text)
    path = tmp_path_factory.mktemp("large") / "page.html"
    return write_browser(Page("large", features=data), path)


def test_4096_features_open_within_two_seconds(browser, large):
    # Processor time of the page's thread: what the page takes, whatever else the machine does.
    tab = browser.new_page()
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(large.as_uri(), wait_until="load")
    tab.wait_for_selector("#chart-codes svg")
    metrics = session.send("Performance.getMetrics")["metrics"]
    seconds = {metric["name"]: metric["value"] for metric in metrics}
    assert 0 < seconds["TaskDuration"] < 2
    assert tab.get_attribute("#grid", "aria-rowcount") == "4097"
    assert tab.locator("#rows .row").count() < 80
    tab.close()
    assert large.stat().st_size < 8e6


def test_a_long_list_scrolls_to_its_end(visit, large):
    tab = visit(large.as_uri())
    tab.focus("#grid")
    tab.keyboard.press("End")
    assert tab.locator(f"#row-{selected(tab)}").get_attribute("aria-rowindex") == "4097"
    tab.keyboard.press("PageUp")
    assert tab.locator(f"#row-{selected(tab)}").is_visible()


def test_without_text_tokens_are_numbered(visit, tmp_path):
    data = gather_features(Planted(6), planted_activations(300, 6))
    tab = visit(write_browser(Page("t", features=data), tmp_path / "p.html").as_uri())
    tab.wait_for_selector("#chart-codes svg")
    row = data.examples[selected(tab)].top[0]
    assert f"token {row}" in tab.inner_text("#detail")
