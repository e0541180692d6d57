"""A real browser, headless, that can reach nothing but this machine."""

from __future__ import annotations

import shutil
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import pytest

_QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--no-sandbox",  # Chromium refuses to run as root with one
)


# Not for the session: as long as it lives, Playwright's event loop counts as running in this thread.
@pytest.fixture(scope="module")
def chromium():
    """A running Chromium of the system's: Playwright's own would have to be downloaded."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_QUIET))
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """Opens a page: call it in a with statement, which yields the page.

    It fails at the end if a script failed, the console showed an error, or anybody but loopback was asked.
    """

    @contextmanager
    def opened(*, width=1280, height=900, dark=False):
        problems = []
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        with closing(context):
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: problems.append(f"error: {error}"))
            page.on("console", lambda said: said.type == "error" and problems.append(f"console: {said.text}"))
            page.on("request", lambda asked: _is_outside(asked.url) and problems.append(asked.url))
            yield page
        assert problems == []

    return opened


def _is_outside(url):
    parts = urlsplit(url)
    return parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("127.0.0.1", "localhost")
