"""The page's text: all of a run's strings escaped, nothing but its own scripts, no address."""

import base64
import hashlib
import json
import sys
from html.parser import HTMLParser
from typing import Any

import pytest

from probsae import Report
from probsae.comparison import Row
from probsae.report import Page, html, write_browser
from tests.report.wicked import WICKED, wicked_page

VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """Elements, their attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.scripts: list[tuple[dict, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = attrs, text + data


@pytest.fixture(scope="module")
def text():
    return html.render(wicked_page())


@pytest.fixture(scope="module")
def parsed(text):
    return Parsed(text)


def test_the_page_has_its_three_scripts_and_no_element_of_the_corpus(parsed):
    assert parsed.open == []
    assert [attrs for attrs, _ in parsed.scripts] == [
        {"type": "application/json", "id": "data"}, {}, {},
    ]  # fmt: skip
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"img", "iframe", "svg", "b", "a", "link", "object", "base", "form"}
    assert not any(name.startswith("on") for _, attrs in parsed.elements for name in attrs)


def test_the_policy_names_exactly_the_scripts(parsed):
    (policy,) = (a["content"] for _, a in parsed.elements if "http-equiv" in a)
    digests = [hashlib.sha256(text.encode()).digest() for _, text in parsed.scripts[1:]]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert f"script-src {' '.join(hashes)};" in policy
    assert policy.startswith("default-src 'none';")


def test_no_attribute_leads_anywhere(parsed):
    names = {name for _, attrs in parsed.elements for name in attrs}
    assert not names & {"src", "href", "action", "srcset", "data", "background", "poster"}


def test_wicked_strings_survive_unchanged(parsed):
    data = json.loads(parsed.scripts[0][1])
    assert set(WICKED) <= set(data["features"]["text"]["strings"])
    assert data["features"]["effects"][0][0] == WICKED[0]
    assert list(data["reliability"]) == [WICKED[0]]


def test_the_data_hold_no_character_that_html_reads(parsed):
    assert not set(parsed.scripts[0][1]) & set("<>&'\u2028\u2029")


def test_a_page_without_features_or_comparison_says_so():
    assert "no dictionary whose features" in html.render(Page("bare"))
    assert "No comparison" in html.render(Page("bare"))
    assert "No reliability diagram" in html.render(Page("bare"))


def test_the_comparison_is_a_table():
    report = Report((Row("one", 8, 0.25, 0.5, 2.0, 7), Row("two", 8, 0.125, 0.5, 2.0, 7)), 1000)
    text = " ".join(html.render(Page("t", report=report)).split())
    assert "2 dictionaries on 1,000 held-out tokens" in text
    assert '<td class="number">0.2500</td><td class="number best">0.1250</td>' in text


def test_values_that_are_no_number_do_not_break_the_page():
    page = Page("nan", history={"step": [1], "elbo": [float("nan")]})
    assert json.loads(Parsed(html.render(page)).scripts[0][1])["history"]["elbo"] == [None]


def test_names_that_are_no_text_do_not_break_the_page(tmp_path):
    """A folder's name may hold any bytes; so may a token."""
    name = b"run\xff".decode(errors="surrogateescape")
    text = write_browser(Page(name, facts={"store": name}), tmp_path / "page.html").read_text()
    assert text.count("run?") >= 2


def test_a_failed_page_leaves_the_old_one(tmp_path):
    path = write_browser(Page("old"), tmp_path / "page.html")
    old = path.read_text()
    unwritable: Any = [object()]
    with pytest.raises(TypeError):
        write_browser(Page("new", facts={"x": "y"}, history={"step": unwritable}), path)
    assert path.read_text() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("missing", ["jinja2", "vl_convert"])
def test_missing_packages_are_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        html.load_template.__wrapped__()  # past the cache
