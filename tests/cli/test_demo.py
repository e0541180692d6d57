import re
import signal
from collections import Counter
from pathlib import Path

import pytest

from perqueue import Report
from perqueue.cli.demo._crew import User
from perqueue.cli.demo._frame import Frame, PerIs, Scene, Turn
from perqueue.cli.demo._verdict import Evidence, percentile, present
from perqueue.cli.demo._view import live_view

SHORT = ("demo", "--plain", "--activities", "600", "--pace", "0.2")


@pytest.fixture
def temporary(tmp_path):
    """Where the demo puts its files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def _ended(pids):
    for pid in pids:
        try:
            if b"perqueue" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return False
        except OSError:
            continue
    return True


def test_everything_acknowledged_arrives(start, temporary):
    """The demo returns 0 after an outage and a kill -9, with every activity accounted for, and cleans up."""
    program = start(*SHORT, TMPDIR=str(temporary))
    code, out, err = program.wait()
    text = "\n".join(out)
    assert (code, err) == (0, []), text
    for scene in ("Per answers 503", "Per is gone", "Per is back", "kill -9", "start it again", "flush()"):
        assert scene in text
    assert re.search(r"GROUP_A +150 +150 +✔", text)
    assert re.search(r"p50 .*, p99 .*, p99\.9 ", text)
    assert "✔ All 600 acknowledged activities are with Per. None is lost." in text
    assert list(temporary.iterdir()) == []


def test_one_lost_activity_is_exit_code_1(start, temporary):
    """The demo returns 1 if a single acknowledged activity is not at Per, and names it."""
    code, out, _ = start(*SHORT, "--lose", TMPDIR=str(temporary)).wait()
    assert code == 1
    assert "✘ 1 of 600 acknowledged activities are not with Per: USER_" in "\n".join(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_it_leaves_nothing_behind(start, temporary, number, until):
    """Ctrl-C and SIGTERM end the demo and its processes, and remove its files."""
    program = start("demo", "--plain", "--activities", "600", TMPDIR=str(temporary))
    while "Per answers 503" not in program.out.next(20):
        pass
    pids = _children(program.process.pid)
    assert len(pids) == 3
    program.process.send_signal(number)
    code, _, err = program.wait()
    assert code == (1 if number == signal.SIGINT else 143)
    assert not any("Traceback" in line for line in err)
    until(lambda: _ended(pids))
    assert list(temporary.iterdir()) == []


def _children(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _evidence(**known):
    a, b = User("GROUP_A", "USER_1"), User("GROUP_A", "USER_2")
    report = Report({"activityTypes": {"TYPE": {"billingIds": {"GROUP_A": {"unique": 2}}}}})
    given = {
        "planned": [a, b],
        "acknowledged": {a, b},
        "ledger": Counter([a, b]),
        "report": report,
        "latencies": [10_000, 20_000],
        "outage": 5.0,
        "outage_recorded": 1,
        "outage_requests": [("HTTP 503", 3)],
        "killed": "process 1 is gone",
    }
    return Evidence(**{**given, **known})


def test_repeats_do_not_count_as_arrivals(capsys):
    """A repeat of one activity does not stand in for another that is missing."""
    a = User("GROUP_A", "USER_1")
    evidence = _evidence(ledger=Counter({a: 2}))
    assert not evidence.holds()
    assert (evidence.lost, evidence.repeats) == ([User("GROUP_A", "USER_2")], 1)
    present(evidence)
    assert "USER_2 of GROUP_A" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"planned": [User("GROUP_A", f"USER_{n}") for n in range(5)]}, "3 activities could not be recorded"),
        ({"report": None}, "no report"),
        ({"report": Report({"activityTypes": {}})}, "Per reports other numbers for GROUP_A"),
        ({"problems": ["a process ended with exit code 1"]}, "a process ended with exit code 1"),
    ],
)
def test_every_other_failure_fails_too(capsys, known, says):
    """The verdict is bad if anything is not as it should be, and says what."""
    evidence = _evidence(**known)
    assert not evidence.holds()
    present(evidence)
    assert says in capsys.readouterr().out


def test_the_verdict_on_a_good_run(capsys):
    """The verdict is good if every activity is there and Per reports the same numbers."""
    evidence = _evidence()
    assert evidence.holds()
    present(evidence)
    assert "✔ All 2 acknowledged" in capsys.readouterr().out


def test_percentiles():
    """A percentile of sorted values is one of them, also at the ends."""
    assert percentile([1, 2, 3, 4], 0.5) == 3
    assert percentile([1], 0.999) == 1
    assert percentile([], 0.5) == 0


def test_the_picture_fits_an_ordinary_terminal(monkeypatch, capsys):
    """The live picture has at most 23 lines of 80 columns, however long it runs and whatever it shows."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    scenes = [Scene("a scene", "a remark that is far too long for the line " * 3, Turn.NOW) for _ in range(7)]
    frame = Frame(total=1_000_000, scenes=scenes, recorded=1_000_000, per=PerIs.GONE)
    frame.stats = {"state": "backing_off", "reason": "something long " * 9, "delivered": 1_000_000}
    frame.processes = [(4_194_304, "done, delivers")] * 3
    frame.history = [(n * n, PerIs.UP) for n in range(500)]
    with live_view() as view:
        view.show(frame)
    lines = capsys.readouterr().out.splitlines()
    assert 20 <= len(lines) <= 23
    assert {len(line) for line in lines} == {80}
