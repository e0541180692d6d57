"""The page of `report --html`, as somebody sees it who has only this one file."""

from contextlib import closing

import pytest
from click.testing import CliRunner

from perqueue.cli import main
from perqueue.sandbox import Refuse, Sandbox
from tests.month import DAY, END, HOUR, PERIOD, START, Month

SCRIPT = "<script>document.title = 'hacked'</script>"
NASTY = (
    SCRIPT,
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED} 12",
    "evil\u202etxt.exe",
    "x" * 400,
    "\N{PARTY POPPER}" * 100,
    "</script></table>",
    "line\nbreak\x1b[31m",
    "lone \ud800 surrogate",
)


@pytest.fixture
def make_page(tmp_path, outbox, per):
    """Run the command with what it needs, and return the address of the page."""

    def make(*arguments, code=0, sandbox=per):
        path = tmp_path / "usage.html"
        env = {
            "PER_BASE_URL": sandbox.url,
            "PER_REPORTING_TOKEN": sandbox.reporting_token,
            "PERQUEUE_OUTBOX": str(outbox),
        }
        result = CliRunner().invoke(main, ["report", *PERIOD, "--html", str(path), *arguments], env=env)
        assert result.exit_code == code, result.output
        return path.as_uri()

    return make


@pytest.fixture
def month(outbox, per):
    """A month with two activity types, and with every kind of trouble."""
    with closing(Month(outbox, per)) as month:
        for number in range(12):
            month.delivered("ACME", f"USER_{number}", START + number * DAY)
            month.delivered("ACME", f"USER_{number}", START + (number + 1) * DAY)
        for number in range(3):
            month.delivered("GLOBEX", f"USER_{number}", START + 20 * DAY, kind="EXPORT")
        month.delivered("LATE_AT_END", "USER_1", END - HOUR, END + HOUR)
        month.delivered("LATE_AT_START", "USER_2", START - HOUR, START + HOUR)
        month.recorded("STUCK", "USER_3", START + DAY)
        month.rejected("REFUSED", "USER_4", START + DAY, "user IDs must be opaque")
        month.at_per("FOREIGN", "STRANGER", START + DAY)
        yield month


def table(page, selector):
    """Return the visible rows of a table: the first cell, and the others."""
    rows = page.eval_on_selector_all(
        f"{selector} >> tbody tr",
        "rows => rows.filter(r => !r.hidden).map(r => [...r.cells].map(c => c.innerText.trim()))",
    )
    return {row[0]: row[1:] for row in rows}


@pytest.mark.usefixtures("month")
def test_the_numbers_are_pers(browse, make_page):
    """Title, source, totals and each billing ID's number are what Per was asked for and said."""
    with browse() as page:
        page.goto(make_page("--by", "day"))
        assert page.inner_text("h1") == page.title() == "Usage in March 2026"
        facts = page.inner_text(".facts >> nth=0")
        assert "1 Mar 2026, 00:00 UTC to 31 Mar 2026, 23:59 UTC" in facts
        assert "Per, at http://127.0.0.1:" in facts
        tiles = page.inner_text("header")
        assert "LOGIN\n14\nunique users in 3 billing IDs" in tiles
        assert "EXPORT\n3\nunique users in 1 billing ID" in tiles
        assert table(page, ".bars >> nth=0")["ACME"][1] == "12"
        bars = page.locator(".bars >> nth=0").locator("td:nth-child(2) rect")
        assert [bar.get_attribute("width") for bar in bars.all()] == ["100.00%", "8.33%", "8.33%"]
        assert [row[:3] for row in table(page, "#all").values()][:2] == [
            ["LOGIN", "12", "12"],
            ["EXPORT", "3", "3"],
        ]
        # On the second day: two users of ACME, and the stranger.
        page.click("summary >> nth=0")
        days = table(page, "details >> nth=0")
        assert len(days) == 31
        assert days["Mon 2 Mar 2026"] == ["3"]
        columns = page.locator(".plot >> nth=0").locator(".area rect")
        assert columns.first.locator("title").text_content() == "Sun 1 Mar 2026: 2 unique users"
        assert "the steps do not add up to it" in page.inner_text("main")


@pytest.mark.usefixtures("month")
def test_every_trouble_is_explained_and_traced(browse, make_page, outbox):
    """Late, pending, rejected and unexplained ones stand there with words and with the command for each."""
    with browse() as page:
        page.goto(make_page())
        said = page.inner_text("section[aria-labelledby=agrees]")
        assert "1 of 7 numbers cannot be explained" in said
        differ = table(page, "section[aria-labelledby=agrees] table >> nth=0")
        assert list(differ) == ["FOREIGN", "LATE_AT_END", "LATE_AT_START", "REFUSED", "STUCK"]
        assert "something else feeds the same account" in differ["FOREIGN"][-1]
        assert differ["LATE_AT_START"][-1].endswith(
            f"perqueue history --outbox {outbox} --billing LATE_AT_START --activity-type LOGIN"
            " --since 2026-02-28T23:00:00.000Z --until 2026-04-01"
        )
        assert "Late: 2 activities" in said
        assert "counts after this period" in said
        assert "counts in this period" in said
        assert "Pending: 1 activity" in said
        assert "user IDs must be opaque" in said


def test_a_printed_command_finds_the_activity(browse, make_page, month, outbox):
    """What the page says to type shows the activity that the page speaks of."""
    with browse() as page:
        page.goto(make_page())
        commands = page.eval_on_selector_all("code", "found => found.map(each => each.textContent)")
        late = [each for each in commands if "--billing LATE_AT_START" in each]
    result = CliRunner().invoke(main, late[0].split()[1:])
    assert (result.exit_code, result.stdout.count("USER_2")) == (0, 1)


def test_ids_are_text_and_nothing_else(browse, make_page, outbox, per):
    """Markup, templates, turned-around text, control characters and 400 bytes are shown, and do nothing."""
    with closing(Month(outbox, per)) as month:
        for text in NASTY:
            month.at_per(text, "USER", START + DAY)
            if text.isprintable():
                month.rejected(text, text, START + DAY, reason=text)
    for width in (390, 1280):
        with browse(width=width) as page:
            page.goto(make_page("--by", "week"))
            assert page.title() == "Usage in March 2026"
            shown = table(page, "#all")
            assert SCRIPT in shown
            assert "evil\\u202etxt.exe" in shown
            assert "lone \\ud800 surrogate" in shown
            assert len(shown) == len(NASTY)
            assert page.locator("main script, main img").count() == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if width > 390:
                assert page.eval_on_selector("#all", "t => t.scrollWidth <= t.parentElement.clientWidth")


@pytest.mark.usefixtures("month")
def test_search_and_sort(browse, make_page):
    """The table of all numbers is searched and filtered as one types, and sorted by a click on a heading."""
    with browse() as page:
        page.goto(make_page())
        assert next(iter(table(page, "#all"))) == "ACME"
        page.fill("#search", "late_")
        assert list(table(page, "#all")) == ["LATE_AT_START", "LATE_AT_END"]
        assert page.inner_text("#said") == "2 of 7 rows shown"
        page.fill("#search", "export")  # an activity type
        assert list(table(page, "#all")) == ["GLOBEX"]
        page.fill("#search", "")
        page.select_option("#verdict", "unexplained")
        assert list(table(page, "#all")) == ["FOREIGN"]
        page.select_option("#verdict", "")
        page.click("#all th button >> nth=0")
        assert list(table(page, "#all")) == sorted(table(page, "#all"))
        for order, first in (("descending", "12"), ("ascending", "0")):
            page.click("#all th button:text-is('Per')")
            assert page.get_attribute("#all th:has(button:text-is('Per'))", "aria-sort") == order
            assert next(iter(table(page, "#all").values()))[1] == first


def test_types_that_only_the_outbox_knows_are_told_apart(browse, make_page, outbox, per):
    """Where Per counts one activity type, and another one is pending, each number says which it is of."""
    with closing(Month(outbox, per)) as month:
        month.delivered("ACME", "USER_1", START + DAY)
        month.recorded("ACME", "USER_2", START + DAY, kind="EXPORT")
    with browse() as page:
        page.goto(make_page())
        kinds = page.locator("#all tbody td.id")
        assert kinds.all_inner_texts() == ["LOGIN", "EXPORT"]
        assert page.locator("td[data-label='Activity type']").all_inner_texts() == ["EXPORT"]
        page.fill("#search", "export")
        assert page.inner_text("#said") == "1 of 2 rows shown"


def test_many_billing_ids_stay_readable(browse, make_page, outbox, per):
    """Of 300 billing IDs the charts show 15 and the table 100, until one asks for all of them."""
    with closing(Month(outbox, per)) as month:
        for number in range(300):
            month.at_per(f"CUSTOMER_{number:03}", "USER", START + DAY)
    with browse() as page:
        page.goto(make_page())
        assert len(table(page, ".bars")) == 15
        assert "The other 285 billing IDs have 285 unique users together" in page.inner_text("main")
        assert len(table(page, "#all")) == 100
        assert page.inner_text("#more") == "Show all 300"
        page.fill("#search", "299")
        assert list(table(page, "#all")) == ["CUSTOMER_299"]
        page.fill("#search", "")
        page.click("#more")
        assert len(table(page, "#all")) == 300


@pytest.mark.usefixtures("month")
def test_without_scripts_everything_is_there(chromium, make_page):
    """Without JavaScript there are all rows, and no control that does nothing."""
    context = chromium.new_context(java_script_enabled=False)
    with closing(context):
        page = context.new_page()
        page.goto(make_page())
        assert page.locator("#all tbody tr:visible").count() == 7
        assert page.locator("#tools:visible, th button").count() == 0


@pytest.mark.parametrize(
    ("tag", "change", "refusal"),
    [
        ("script", "e.text = 'x = 1'", "inline script violates"),
        ("style", "e.textContent = 'p { color: red }'", "inline style violates"),
        ("img", "e.src = 'http://127.0.0.1:1/pixel.png'", r"pixel.png\S* violates"),
        ("iframe", "e.src = 'http://127.0.0.1:1/frame'", r"violates"),
    ],
)
@pytest.mark.usefixtures("month")
def test_the_page_may_load_nothing(browse, make_page, tag, change, refusal):
    """The page's own policy refuses a foreign script, style, image and frame, whoever got one into it."""
    address = make_page()

    def intrude():
        with browse() as page:
            page.goto(address)
            page.evaluate(
                f"{{ const e = document.createElement({tag!r}); {change}; document.body.append(e) }}"
            )
            page.evaluate("new Promise(requestAnimationFrame)")
            assert page.evaluate("typeof x") == "undefined"

    with pytest.raises(AssertionError, match=f"{refusal} the following Content Security Policy"):
        intrude()


def contrast(page, selector):
    """Return the contrast of a text to what is behind it, as WCAG counts it."""
    return page.eval_on_selector(
        selector,
        """node => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map(v => v / 255)
              .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          let behind = node;
          while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)")
            behind = behind.parentElement;
          const [a, b] = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(light);
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
    )


@pytest.mark.usefixtures("month")
@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_can_be_read(browse, make_page, dark):
    """In both schemes every kind of text has a contrast of at least 4.5, and dark is dark."""
    with browse(dark=dark) as page:
        page.goto(make_page("--by", "day"))
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(18, 22, 28)" if dark else "rgb(245, 246, 248)"
        )
        for selector in ("h1", ".soft", ".good", ".fair", ".bad", "code", ".zero", "summary", "footer"):
            assert contrast(page, selector) >= 4.5, selector


@pytest.mark.usefixtures("month")
def test_a_telephone_shows_it_all(browse, make_page):
    """At 390 pixels nothing makes the page wider than the screen, and the tables' cells say what they are."""
    with browse(width=390, height=844, dark=True) as page:
        page.goto(make_page("--by", "day"))
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        cell = page.locator(".stack [data-label]").first
        assert cell.evaluate("c => getComputedStyle(c).display") == "block"
        assert "Activity type" in cell.evaluate("c => getComputedStyle(c, '::before').content")


@pytest.mark.usefixtures("month")
def test_it_prints(browse, make_page, tmp_path):
    """On paper it is light, without controls, and becomes a PDF of some pages."""
    with browse(dark=True) as page:
        page.goto(make_page("--by", "day"))
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.is_visible("#tools")
        pdf = page.pdf(format="A4")
        assert pdf.startswith(b"%PDF")
        assert 2 <= pdf.count(b"/Type /Page\n") <= 12


def test_an_unknown_day_is_no_empty_day(browse, make_page, outbox):
    """A day that Per did not answer for is hatched, called unknown, and named with the reason."""
    asked = []

    def count(request):
        asked.append(request)
        if len(asked) == 2:
            sandbox.set_fault(Refuse("come back tomorrow"), times=1, endpoint="reports.get")

    with Sandbox(on_request=count) as sandbox, closing(Month(outbox, sandbox)) as month:
        month.delivered("ACME", "USER_1", START + 5 * DAY)
        with browse() as page:
            page.goto(make_page("--by", "day", code=1, sandbox=sandbox))
            assert "did not answer for 1 of 31 days" in page.inner_text("header")
            hatched = page.locator(".area .missing")
            assert [each.text_content() for each in hatched.all()] == ["Mon 2 Mar 2026: no answer from Per"]
            page.click("summary >> nth=0")
            days = table(page, "details >> nth=0")
            assert (days["Mon 2 Mar 2026"], days["Tue 3 Mar 2026"]) == (["unknown"], ["0"])
            assert "come back tomorrow" in page.inner_text("section[aria-labelledby=series]")


@pytest.mark.usefixtures("month")
def test_its_structure_can_be_heard(browse, make_page):
    """Every section is named, every table has headings or a caption, every chart says what it is."""
    with browse() as page:
        page.goto(make_page("--by", "day"))
        assert page.get_attribute("html", "lang") == "en"
        names = page.eval_on_selector_all("section", "s => s.map(e => e.getAttribute('aria-labelledby'))")
        assert [page.locator(f"h2#{name}").count() for name in names] == [1] * 6
        assert page.locator("table:not(:has(thead th[scope=col]))").count() == 0
        assert page.locator("tbody tr:not(:has(th[scope=row]))").count() == 0
        assert page.locator("svg:not([aria-hidden]):not([role=img]):not([role=img] svg)").count() == 0
        assert page.locator("input, select").count() == page.locator("label > input, label > select").count()
