"""A headless Chromium for tests of pages: the system's, or playwright's own."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_ADVICE = (
    "page tests need Chromium: apt-get install chromium-headless-shell (Debian), or "
    "python -m playwright install --only-shell chromium; `make browser` does one of them"
)


def find_chromium(playwright: Playwright) -> str:
    """Return the executable, or say how to install one."""
    own = playwright.chromium.executable_path
    found = [path for name in _NAMES if (path := shutil.which(name))]
    if Path(own).exists():
        found.append(own)
    if not found:
        raise FileNotFoundError(_ADVICE)
    return found[0]


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Chromium; the sandbox, which root cannot have, is off: pages are the tests' own."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(playwright), args=["--no-sandbox"]
        )
        try:
            yield browser
        finally:
            browser.close()


def screenshot(page: str | Path, out: str | Path, *, dark: bool = False, feature: int = 0) -> None:
    """Save a picture of one feature of a browser page."""
    with chromium() as browser:
        tab = browser.new_page(
            viewport={"width": 1440, "height": 860}, color_scheme="dark" if dark else "light"
        )
        tab.goto(f"{Path(page).resolve().as_uri()}#f{feature}")
        tab.wait_for_selector("#chart-codes svg")
        tab.screenshot(path=out)


if __name__ == "__main__":
    # python -m tests.report.chromium finds one; with PAGE OUT [FEATURE] it takes a picture.
    if len(sys.argv) > 2:
        screenshot(sys.argv[1], sys.argv[2], feature=int(sys.argv[3]) if sys.argv[3:] else 0)
    else:
        with sync_playwright() as playwright:
            print(find_chromium(playwright))
