"""`report --by`: what Per is asked for, what is shown of it, and what is said when it does not answer."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from rich.console import Console

from perqueue import AuthenticationError, PerAPIError
from perqueue._report import Report
from perqueue.cli._bars import paint
from perqueue.cli._failure import Misuse
from perqueue.cli._series import MOST_STEPS, ask, spans
from perqueue.cli.report import _find
from perqueue.sandbox import Refuse, Sandbox
from tests.month import DAY, PERIOD, START, Month

NOW = datetime(2026, 3, 18, 12, tzinfo=UTC)
WEEK = ("--start", "2026-03-02", "--end", "2026-03-08", "--by", "day")


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def shown(found):
    return [f"{span.start:%m-%d} {span.end:%m-%d}" + " part" * (not span.whole) for span in found]


@pytest.mark.parametrize(
    ("by", "start", "end", "expected"),
    [
        ("day", "2026-03-01", "2026-03-02T23:59:59.999", ["03-01 03-01", "03-02 03-02"]),
        ("day", "2026-02-28T06:00", "2026-03-01T12:00", ["02-28 02-28 part", "03-01 03-01 part"]),
        ("week", "2026-03-02", "2026-03-10", ["03-02 03-08", "03-09 03-10 part"]),
        ("month", "2025-12-31", "2026-01-31T23:59:59.999", ["12-31 12-31 part", "01-01 01-31"]),
        ("day", "2026-03-17", "2026-03-31", ["03-17 03-17", "03-18 03-18 part"]),
        ("day", "2026-03-18", None, ["03-18 03-18 part"]),
        ("day", "2026-03-19", None, []),
    ],
)
def test_a_period_is_cut_at_midnights_of_utc(by, start, end, expected):
    """Steps are calendar days, weeks from Monday and months, without a gap; the future is not asked for."""
    found = spans(at(start), end and at(end), by, NOW)
    assert shown(found) == expected
    assert all(b.start - a.end == timedelta(milliseconds=1) for a, b in pairwise(found))


def test_too_many_requests_are_refused():
    """A year of days is asked for; longer is refused before anything is asked, with what to do."""
    year = spans(START - 365 * DAY, START, "day", NOW)
    assert len(year) == 366 <= MOST_STEPS
    with pytest.raises(Misuse, match=r"more than 400 requests.*longer steps"):
        spans(START - 401 * DAY, START, "day", NOW)


class Scripted:
    """Answers each request by the next item of a script: a number of users, or an exception."""

    def __init__(self, *script):
        self.script, self.waits = list(script), []

    def __call__(self, start, end):
        item = self.script.pop(0)
        if isinstance(item, Exception):
            raise item
        return Report({"activityTypes": {"T": {"billingIds": {"G": {"unique": item}}}}})

    def run(self, days):
        steps = list(ask(self, spans(START, START + days * DAY - DAY / 2, "day", NOW), self.waits.append))
        return [step.error if step.usage is None else step.usage.unique("G") for step in steps]


def test_a_failure_that_may_pass_is_tried_again_after_a_growing_wait():
    """A 503 or a broken connection is asked for again, at most three times in all, and not at once."""
    per = Scripted(PerAPIError("no report: HTTP 503", status=503), PerAPIError("cut off"), 7)
    assert per.run(1) == [7]
    assert len(per.waits) == 2
    assert 2 <= per.waits[0] <= 4 <= per.waits[1]


def test_per_is_asked_no_sooner_than_it_says():
    """What Per asks to wait is waited; if that is more than a minute, it is not asked again."""
    per = Scripted(PerAPIError("busy", status=503, retry_after=20.0), 7)
    assert per.run(1) == [7]
    assert 22 <= per.waits[0] <= 24
    assert Scripted(PerAPIError("full", status=429, retry_after=61.0), 7).run(1) == ["full"]


def test_a_step_without_an_answer_is_not_zero():
    """A step that fails has its reason instead of a number, and the others are asked for all the same."""
    assert Scripted(1, PerAPIError("no", status=400), 3).run(3) == [1, "no", 3]


def test_per_is_not_pressed():
    """After too many requests, or three failures in a row, nothing more is asked, and that is said."""
    full = PerAPIError("full", status=429)
    assert Scripted(1, full, full, full).run(4) == [
        1,
        "full",
        "not asked, after full",
        "not asked, after full",
    ]
    no = PerAPIError("no", status=400)
    assert Scripted(no, no, no).run(4) == ["no", "no", "no", "not asked, after no"]
    assert Scripted(no, no, 1, no, no, 2).run(6) == ["no", "no", 1, "no", "no", 2]


def test_a_refused_token_ends_it():
    """A token that is refused on the way is an error, not a gap in the series."""
    with pytest.raises(AuthenticationError):
        Scripted(1, AuthenticationError("bad", status=401)).run(2)


@pytest.fixture
def month(outbox, per):
    """USER_1 was active on two days, USER_2 on one; both of GROUP_A."""
    seeded = Month(outbox, per)
    seeded.delivered("GROUP_A", "USER_1", START + DAY)
    seeded.delivered("GROUP_A", "USER_1", START + 3 * DAY)
    seeded.delivered("GROUP_A", "USER_2", START + 3 * DAY)
    seeded.close()


@pytest.mark.usefixtures("month")
def test_json_has_the_whole_period_and_each_step(perqueue):
    """`--by --json` has both; the days' sum is 3, the week's unique users are 2, as Per counts them."""
    told = json.loads(perqueue("report", *WEEK, "--json").stdout)
    assert list(told) == ["start", "end", "rows", "by", "steps"]
    assert told["rows"] == [{"activity_type_id": "LOGIN", "billing_id": "GROUP_A", "unique": 2}]
    assert [sum(row["unique"] for row in step["rows"]) for step in told["steps"]] == [1, 0, 2, 0, 0, 0, 0]
    assert told["steps"][0] == {
        "start": "2026-03-02T00:00:00.000Z",
        "end": "2026-03-02T23:59:59.999Z",
        "whole": True,
        "rows": [{"activity_type_id": "LOGIN", "billing_id": "GROUP_A", "unique": 1}],
        "error": None,
    }


@pytest.mark.usefixtures("month")
def test_csv_has_a_row_for_each_number_of_each_step(perqueue):
    """`--by --csv` has stable columns, and a step in which Per lists nothing has no row."""
    rows = list(csv.reader(io.StringIO(perqueue("report", *WEEK, "--csv").stdout)))
    assert rows == [
        ["period_start", "period_end", "activity_type_id", "billing_id", "unique", "error"],
        ["2026-03-02T00:00:00.000Z", "2026-03-02T23:59:59.999Z", "LOGIN", "GROUP_A", "1", ""],
        ["2026-03-04T00:00:00.000Z", "2026-03-04T23:59:59.999Z", "LOGIN", "GROUP_A", "2", ""],
    ]


@pytest.mark.usefixtures("month")
def test_plain_tables_say_that_steps_do_not_add_up(perqueue):
    """Without a terminal there are two plain tables, and on stderr what does not add up."""
    result = perqueue("report", *WEEK)
    assert [line.split() for line in result.stdout.splitlines() if "─" not in line] == [
        ["activity_type_id", "billing_id", "unique"],
        ["LOGIN", "GROUP_A", "2"],
        [],
        ["day", "activity_type_id", "billing_id", "unique"],
        ["2026-03-02", "LOGIN", "GROUP_A", "1"],
        ["2026-03-04", "LOGIN", "GROUP_A", "2"],
    ]
    assert "the steps do not add up to it" in result.stderr


def test_without_dates_it_is_the_month_that_per_chose(perqueue, per):
    """Without a period, the steps are those of the prior month, as Per's own answer has it."""
    first = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    months = json.loads(perqueue("report", "--by", "month", "--json").stdout)["steps"]
    assert [step["whole"] for step in months] == [True]
    assert at(months[0]["end"][:-1]) == first - timedelta(milliseconds=1)
    assert [bool(request.query) for request in per.request_log] == [False, True]


@pytest.fixture
def refusing(outbox):
    """A sandbox that refuses the third report it is asked for, and the command's environment."""
    asked = []

    def count(request):
        asked.append(request)
        if len(asked) == 2:
            sandbox.set_fault(Refuse("come back tomorrow"), times=1, endpoint="reports.get")

    with Sandbox(on_request=count) as sandbox:
        month = Month(outbox, sandbox)
        month.at_per("GROUP_A", "USER_1", START + 3 * DAY)
        month.close()
        yield {"PER_BASE_URL": sandbox.url, "PER_REPORTING_TOKEN": sandbox.reporting_token}


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_a_missing_step_is_named_and_exit_code_1(perqueue, refusing, form):
    """A step that Per did not answer for is in the output and on stderr with the reason; exit code 1."""
    result = perqueue("report", *WEEK, form, **refusing)
    assert result.exit_code == 1
    assert (
        "Per did not answer for 1 of 7 steps:\n  2026-03-03: no report: HTTP 200, come back" in result.stderr
    )
    if form == "--csv":
        [row] = [row for row in csv.reader(io.StringIO(result.stdout)) if row[5] not in ("", "error")]
        assert (row[0][:10], row[2:5]) == ("2026-03-03", ["", "", ""])
        assert "come back tomorrow" in row[5]
    else:
        step = json.loads(result.stdout)["steps"][1]
        assert (step["rows"], step["error"]) == (None, "no report: HTTP 200, come back tomorrow")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_shows_bars_that_fit(outbox, per, monkeypatch, width):
    """On a terminal of any width no line is longer than it, and the largest number has the longest bar."""
    month = Month(outbox, per)
    for number in range(8):
        month.delivered("GROUP_A", f"USER_{number}", START + number * DAY)
    month.delivered("\x1b[31m\N{PARTY POPPER}" + "x" * 300, "USER", START)
    month.close()
    monkeypatch.setenv("PER_BASE_URL", per.url)
    monkeypatch.setenv("PER_REPORTING_TOKEN", per.reporting_token)
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=True, no_color=True, color_system=None)
    paint(_find(START, START + 9 * DAY, None, None), console)
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b[31m" not in text.getvalue()
    assert next(line.count("█") for line in lines if line.startswith("GROUP_A")) >= width // 4
    paint(_find(START, START + 9 * DAY, "day", None), console)
    assert "the steps do not add up" in " ".join(text.getvalue().split())


def test_a_terminal_shows_that_a_step_is_unknown(refusing, monkeypatch):
    """The step that Per did not answer for is a question mark, beside days that are zero."""
    for name, value in refusing.items():
        monkeypatch.setenv(name, value)
    text = io.StringIO()
    paint(_find(START + DAY, START + 8 * DAY, "day", None), Console(file=text, width=80))
    lines = [line.split() for line in text.getvalue().splitlines()]
    assert ["Tue", "2026-03-03", "?", "no", "answer", "from", "Per"] in lines
    assert ["Thu", "2026-03-05", "0"] in lines
    assert ["GROUP_A", "1", "?█"] in lines


@pytest.fixture
def on_terminal(env):
    """Run the command with its output on a terminal of 80 columns, and return what it shows."""

    def run(*arguments, **more):
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
        command = [sys.executable, "-m", "perqueue", "report", *arguments]
        with (
            os.fdopen(ours, "rb", buffering=0) as screen,
            subprocess.Popen(
                command,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                env={**clean, **env, "TERM": "xterm", **more},
            ) as process,
        ):
            os.close(theirs)
            shown = b""
            try:
                while chunk := screen.read(65536):
                    shown += chunk
            except OSError:  # the other end is closed
                pass
        assert process.returncode == 0
        return shown.decode().replace("\r", "").splitlines()

    return run


@pytest.mark.usefixtures("month")
def test_bars_are_for_terminals(on_terminal):
    """A terminal shows bars in colour, without colour where NO_COLOR is set; a dumb one the plain table."""
    lines = on_terminal(*WEEK)
    assert any("█" in line and "\x1b[" in line for line in lines)
    lines = on_terminal(*WEEK, NO_COLOR="1")
    assert any("█" in line for line in lines)
    assert not any("\x1b[3" in line for line in lines)
    assert max(len(re.sub(r"\x1b\[\d*m", "", line)) for line in lines) <= 80
    assert on_terminal(*WEEK, TERM="dumb")[0].split() == ["activity_type_id", "billing_id", "unique"]


def test_no_activity_at_all(perqueue):
    """A period without activity says so, with and without steps."""
    for more in ([], ["--by", "day"]):
        result = perqueue("report", *PERIOD, *more)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "No activity in this period" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--by", "year"),
        ("--start", "2001-01-01", "--by", "day"),
        ("--json", "--html", "x"),
        ("--outbox", "x"),
    ],
)
def test_misuse(perqueue, arguments):
    """What cannot be meant is exit code 2 and one line."""
    result = perqueue("report", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
