"""`report --html`: where the page goes, what it is compared with, and what its commands mean to a shell."""

import json
import re
import shlex
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from perqueue.cli._findings import quoted
from perqueue.sandbox import Sandbox
from tests.month import DAY, END, HOUR, PERIOD, START, Month

GUIDE = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")


@pytest.fixture
def month(outbox, per):
    """Two users delivered, one of them late, and one pending."""
    seeded = Month(outbox, per)
    seeded.delivered("GROUP_A", "USER_1", START + DAY)
    seeded.delivered("GROUP_A", "USER_2", END - HOUR, END + HOUR)
    seeded.recorded("GROUP_B", "USER_3", START + DAY)
    seeded.close()


@pytest.mark.usefixtures("month")
def test_the_page_is_written_for_its_owner_only(perqueue, tmp_path):
    """A new page can be read by its owner only; writing it again keeps the permissions that it was given."""
    page = tmp_path / "usage.html"
    assert perqueue("report", *PERIOD, "--html", page).exit_code == 0
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    page.chmod(0o644)
    page.write_text("old")
    result = perqueue("report", *PERIOD, "--html", page)
    assert (result.exit_code, result.stdout) == (0, "")
    assert stat.S_IMODE(page.stat().st_mode) == 0o644
    assert "<title>Usage in March 2026</title>" in page.read_text()


@pytest.mark.usefixtures("month")
def test_a_period_that_is_not_over_says_so(perqueue):
    """Numbers that can still grow are called so, and others are not."""
    warning = "The period is not over."
    assert warning in perqueue("report", "--last", "1h", "--html", "-").stdout
    assert warning not in perqueue("report", *PERIOD, "--html", "-").stdout


@pytest.mark.usefixtures("month")
def test_standard_output_is_a_dash(perqueue):
    """`--html -` prints the page, and nothing else."""
    result = perqueue("report", *PERIOD, "--html", "-")
    assert result.stdout.startswith("<!doctype html>\n")
    assert result.stdout.endswith("</html>\n")


@pytest.mark.usefixtures("month")
def test_a_page_that_cannot_be_finished_leaves_the_old_one(perqueue, tmp_path, monkeypatch):
    """If the page cannot be written, the old one is untouched, and no half of a new one lies about."""
    page = tmp_path / "pages" / "usage.html"
    page.parent.mkdir()
    page.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device", str(page))

    monkeypatch.setattr("os.fsync", full)
    result = perqueue("report", *PERIOD, "--html", page)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "No space left on device" in result.stderr
    assert [(each.name, each.read_text()) for each in page.parent.iterdir()] == [("usage.html", "old")]


@pytest.mark.parametrize("target", ["/nowhere/usage.html", "/", ""])
def test_no_file_is_told_before_per_is_asked(perqueue, per, target):
    """A page that cannot be written, for want of a directory or being one, is refused before Per is asked."""
    result = perqueue("report", "--html", target)
    assert (result.exit_code, result.stderr.count("\n"), per.requests) == (2, 1, 0)


def test_without_the_extra_the_remedy_is_named(perqueue, monkeypatch, tmp_path):
    """Where jinja2 is missing, the error names what to install."""
    for name in [*(name for name in sys.modules if name.startswith("perqueue.cli._page"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = perqueue("report", "--html", tmp_path / "usage.html")
    assert result.exit_code == 2
    assert "pip install 'useper-perqueue[report]'" in result.stderr


@pytest.mark.usefixtures("month")
def test_the_environments_outbox_is_compared_with_if_it_is_there(perqueue, tmp_path):
    """PERQUEUE_OUTBOX serves the page where the file exists; without it the page is made all the same."""
    heading = "Does it agree with what was recorded here?"
    assert heading in perqueue("report", *PERIOD, "--html", "-").stdout
    result = perqueue("report", *PERIOD, "--html", "-", PERQUEUE_OUTBOX=str(tmp_path / "none.db"))
    assert heading not in result.stdout
    assert "Without a comparison: there is no outbox at" in result.stderr
    assert perqueue("report", *PERIOD, "--html", "-", "--outbox", tmp_path / "none.db").exit_code == 2


@pytest.mark.usefixtures("month")
def test_another_origins_outbox_is_refused(perqueue, outbox):
    """An outbox that feeds another Per explains nothing of this one's numbers: it is refused."""
    with Sandbox() as other:
        result = perqueue(
            "report", "--html", "-", "--outbox", outbox,
            PER_BASE_URL=other.url, PER_REPORTING_TOKEN=other.reporting_token,
        )  # fmt: skip
    assert (result.exit_code, result.stdout) == (2, "")


@pytest.mark.usefixtures("month")
def test_an_outbox_without_an_origin_stays_so(perqueue, outbox):
    """Whose a salvaged outbox is that has lost its origin, a report does not decide: it only reads."""
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("UPDATE perqueue_outbox SET origin = NULL")
    assert perqueue("report", *PERIOD, "--json", "--outbox", outbox).exit_code == 0
    with closing(sqlite3.connect(outbox)) as connection:
        assert connection.execute("SELECT origin FROM perqueue_outbox").fetchone() == (None,)


@pytest.mark.usefixtures("month")
def test_json_has_the_reconciliation_if_it_is_asked_for(perqueue, outbox):
    """`--json --outbox` adds what `reconcile --json` prints; PERQUEUE_OUTBOX alone adds nothing."""
    assert list(json.loads(perqueue("report", *PERIOD, "--json").stdout)) == ["start", "end", "rows"]
    told = json.loads(perqueue("report", *PERIOD, "--json", "--outbox", outbox).stdout)
    assert told["reconciliation"] == json.loads(perqueue("reconcile", *PERIOD, "--json").stdout)


@pytest.mark.parametrize(
    "text",
    ["GROUP_A", "-x", "it's; rm -rf /", "a\nb\\'c", "\u202egpj.exe", "\N{PARTY POPPER} שלום", "\ta$(b)`c`"],
)
def test_an_id_is_one_word_to_a_shell(text):
    """Whatever an ID is, the shell reads the printed word as exactly that, and all of it is visible."""
    word = quoted(text)
    assert word.isprintable()
    read = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True).stdout
    assert read.decode() == text


@pytest.mark.usefixtures("month")
@pytest.mark.parametrize("line", re.findall(r"^perqueue (report.*?)(?: +#.*| > .*)?$", GUIDE, re.MULTILINE))
def test_the_guides_commands_run(perqueue, outbox, monkeypatch, line):
    """Every command of docs/report.md does what it says there, in the folder of an outbox."""
    monkeypatch.chdir(outbox.parent)
    assert perqueue(*shlex.split(line)).exit_code == 0


def test_the_guide_names_every_option(perqueue):
    """Every option of the command is explained in docs/report.md."""
    options = set(re.findall(r"--[a-z]+", perqueue("report", "--help").stdout)) - {"--help"}
    assert options <= set(re.findall(r"--[a-z]+", GUIDE))
