"""The browser that the other tests use sees what it has to see."""

from __future__ import annotations

import pytest


def test_the_browser_runs_scripts(browse):
    """A page's script has run when the test looks."""
    with browse() as page:
        page.set_content("<p id=p>no</p><script>document.getElementById('p').textContent = 'yes'</script>")
        assert page.inner_text("#p") == "yes"


@pytest.mark.parametrize(
    "mistake",
    ["<script>throw new Error('a mistake')</script>", "<img src='http://192.0.2.1/pixel.png'>"],
    ids=["an error", "a request to somebody else"],
)
def test_a_page_with_a_mistake_fails(browse, mistake):
    """A page that throws, or that asks a foreign host, is noticed: the other tests' negative control."""

    def look():
        with browse() as page:
            page.set_content(mistake, wait_until="commit")
            page.evaluate("new Promise(requestAnimationFrame)")

    with pytest.raises(AssertionError, match=r"a mistake|192\.0\.2\.1"):
        look()
