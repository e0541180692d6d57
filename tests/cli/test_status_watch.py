import json
import os
import re
import signal
import sqlite3
import time
from contextlib import closing

import pytest
from rich.console import Console

from perqueue._outbox import Hold, OperatorOutbox
from perqueue._outbox.look import FileOnlooker, Request
from perqueue.cli._screen import Screen
from perqueue.cli._sight import Sight
from perqueue.cli._track import Track
from perqueue.sandbox import BadToken, Status
from tests.cli._terminal import Terminal

WATCH = ("status", "--watch", "--interval", "0.1")


def _line_with(program, words, timeout=20):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        line = program.out.next(max(0.0, deadline - time.monotonic()))
        assert line is not None, f"no line with {words!r}; {program.err.rest() if program.err.ended else ''}"
        if words in line:
            return line
    raise AssertionError(words)


def test_an_outage_is_seen_coming_and_going(start, make_queue, per):
    """From another process: delivering or idle, then backing off with the reason, then idle again."""
    queue = make_queue()
    program = start(*WATCH)
    _line_with(program, "idle: nothing is pending")
    per.set_fault(Status(503))
    queue.record("GROUP_A", "USER_1")
    line = _line_with(program, "backing off until ")
    assert "pending 1 (" in line
    assert "because HTTP 503 -> Per or the way to it is down" in line
    per.clear_faults()
    queue.flush()
    assert "pending 0" in _line_with(program, f"process {os.getpid()} drains")
    queue.close()
    _line_with(program, "and nobody drains")


def test_a_bad_token_and_nobody_who_drains(start, make_queue, per):
    """A refused token is named with its remedy; so is that nobody delivers."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    program = start(*WATCH)
    assert "start the program that delivers" in _line_with(program, "nobody drains")
    per.set_fault(BadToken())
    queue = make_queue()
    assert "-> give the drainer a token" in _line_with(program, "paused: bad token: ")
    queue.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_when_it_is_told_to(start, make_queue, number):
    """Ctrl-C and SIGTERM end it with exit code 0, at once, and without a word."""
    make_queue(drain=False)
    program = start("status", "--watch", "--interval", "3600")
    _line_with(program, "idle")
    program.process.send_signal(number)
    assert program.wait() == (0, [], [])


def test_it_outlives_the_file(start, make_queue, outbox):
    """A file that is taken away is told, and so is its return."""
    make_queue(drain=False).close()
    program = start(*WATCH)
    _line_with(program, "idle")
    outbox.rename(outbox.with_name("elsewhere"))
    _line_with(program, "outbox trouble: ")
    outbox.with_name("elsewhere").rename(outbox)
    _line_with(program, "idle")


def test_it_waits_for_the_first_record(start, make_queue, outbox):
    """Where there is no file yet it says so, makes none, and shows the outbox as soon as there is one."""
    program = start(*WATCH)
    assert f"there is no outbox at {outbox}: is the path right?" in _line_with(program, "outbox trouble: ")
    assert not outbox.exists()
    make_queue(drain=False).record("GROUP_A", "USER_1")
    _line_with(program, "pending 1")


def test_what_is_no_outbox_is_not_watched(perqueue, outbox):
    """A file that holds something else ends the watch at once: exit code 2, one line."""
    outbox.write_text("notes")
    result = perqueue(*WATCH)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_json_is_one_object_for_each_look(start, make_queue, per):
    """`--watch --json` prints an object a line: what `status --json` has, rates, answer times, errors."""
    queue = make_queue()
    per.set_fault(Status(503), times=1)
    queue.record("GROUP_A", "USER_1")
    queue.flush()
    program = start(*WATCH, "--json")
    shown = [json.loads(program.out.next(20)) for _ in range(3)][-1]
    assert (shown["pending"], shown["delivered"], shown["mood"]) == (0, 1, "well")
    assert [shown[f"{what}_per_second"] for what in ("pending", "recorded", "delivered")] == [0, 0, 0]
    assert shown["answers"]["count"] == 1
    assert 0 <= shown["answers"]["p50_ms"] <= shown["answers"]["p99_ms"]
    [error] = shown["errors"]
    assert (error["reason"], error["count"]) == ("HTTP 503", 1)


def test_a_damaged_time_ends_no_watch(start, make_queue, per, outbox):
    """A failed attempt at a time that no calendar has is shown as the nearest that one has."""
    queue = make_queue()
    per.set_fault(Status(503), times=1)
    queue.record("GROUP_A", "USER_1")
    queue.flush()
    queue.close()
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("UPDATE perqueue_attempt SET attempted_at = ?", (2**62,))
    [error] = json.loads(start(*WATCH, "--json").out.next(20))["errors"]
    assert error["last_at"].startswith("9999-12-31")


# -- in a terminal

COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38;[\d;]+)m")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_terminal_is_given_back(env, make_queue, number):
    """In a terminal it paints a screen of its own; at the end that is gone, and the last line stays."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    with Terminal(["-m", "perqueue", *WATCH], env) as terminal:
        terminal.until("nobody drains")
        terminal.until("Ctrl-C ends")
        assert "\x1b[?1049h" in terminal.output
        assert COLOUR.search(terminal.output)
        assert terminal.end(number) == 0
        rest = terminal.output.rpartition("\x1b[?1049l")[2]
        assert "\x1b[?25h" in terminal.output  # the cursor
        assert "pending 1" in rest
        assert "Traceback" not in terminal.output


def test_no_color_is_obeyed(env, make_queue):
    """With NO_COLOR it paints without colours, and marks its states by signs."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    with Terminal(["-m", "perqueue", *WATCH], {**env, "NO_COLOR": "1"}) as terminal:
        terminal.until("Ctrl-C ends")
        assert "✖" in terminal.output
        assert not COLOUR.search(terminal.output)


@pytest.mark.parametrize("what", [{"TERM": "dumb"}, {"PYTHONIOENCODING": "latin-1"}], ids=["dumb", "latin-1"])
def test_a_terminal_that_cannot_paint_gets_lines(env, make_queue, what):
    """A terminal without a cursor, or without the characters, gets lines."""
    make_queue(drain=False)
    with Terminal(["-m", "perqueue", *WATCH], {**env, **what}) as terminal:
        terminal.until("idle: nothing is pending")
        assert "\x1b" not in terminal.output


def test_without_the_library_it_prints_lines_and_says_why(env, make_queue):
    """Where rich is not installed, it names the extra, and prints lines."""
    make_queue(drain=False)
    script = f"import sys; sys.modules['rich'] = None; from perqueue.cli import main; main({list(WATCH)!r})"
    with Terminal(["-c", script], env) as terminal:
        terminal.until("idle: nothing is pending")
        assert "install useper-perqueue[watch]" in terminal.output
        assert "\x1b" not in terminal.output


# -- what is painted


@pytest.fixture
def look(outbox, per):
    """How an outbox with a long story looks."""
    opened = OperatorOutbox(outbox, per.url)
    for number in range(5):
        opened.append("GROUP_A", f"USER_{number}", "TYPE", 1_000_000)
    opened.set_hold(
        Hold(kind="backing_off", reason="HTTP 503: " + "why " * 40, until=1_500_000, wait_ms=10_000)
    )
    opened.close()
    nasty = "\x1b[2J" + "漢字" * 60
    return (
        FileOnlooker(outbox)
        .look()
        ._replace(
            answers=[Request(1_499_000, ms) for ms in range(1, 101)] + [Request(1, 9_999)],
            failures=[Request(1_490_000 + n, 7, f"{n % 30} {nasty}") for n in range(300)],
            refusals=[Request(1_498_000, 8, "unknown activity type")] * 2,
        )
    )


def _picture(look, outbox, **changes):
    track = Track()
    for second in range(200):
        sight = Sight(**{"path": outbox, "now": 1_495_000 + second, "drained": True, "look": look, **changes})
        picture = track.add(sight, float(second))
    return picture


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 12), (20, 5), (300, 100)])
@pytest.mark.parametrize("drained", [True, False, None])
def test_every_screen_fits(look, outbox, size, drained):
    """Whatever is to be said, it fits into the terminal, and commands nothing."""
    width, height = size
    console = Console(width=width, height=height, force_terminal=True, color_system=None, highlight=False)
    for seen, error in ((look, None), (None, "disk\ttrouble " * 50)):
        picture = _picture(seen, outbox, drained=drained, error=error)
        lines = console.render_lines(Screen(2.0)._panel(picture, min(width, 120), height), pad=False)
        assert len(lines) == height
        assert all(sum(segment.cell_length for segment in line) <= width for line in lines)
        assert "\x1b[2J" not in "".join(segment.text for line in lines for segment in line)


def test_percentiles_are_of_the_last_minutes(look, outbox):
    """Answer times are those of the last five minutes: an older answer does not count."""
    answers = _picture(look, outbox).answers
    assert (answers.requests, answers.p50, answers.p95, answers.p99) == (100, 50, 95, 99)


def test_errors_are_grouped_the_latest_first(look, outbox):
    """Failures and refusals are counted by their reason, the latest first."""
    errors = _picture(look, outbox).errors
    assert (errors[0].reason, errors[0].times, errors[0].last_at) == ("unknown activity type", 2, 1_498_000)
    assert len(errors) == 31
    assert sum(each.times for each in errors) == 302


def test_rates_are_those_of_now(look, outbox):
    """A rate is of the last seconds, and starts anew when delivery stops or another file is there."""
    track = Track()

    def see(at, accepted, hold=None, outbox_id="a"):
        position = look.position._replace(last_id=10_000, accepted=accepted, hold=hold)
        seen = look._replace(position=position, outbox_id=outbox_id)
        return track.add(Sight(path=outbox, now=1_000_000, drained=True, look=seen), at).rates

    assert see(0.0, 0) is None
    assert see(1.0, 100).delivered == 100
    assert see(2.0, 300).delivered == 150
    assert see(2.0, 300).pending == -150
    hold = Hold(kind="backing_off", reason="why", until=1_005_000, wait_ms=5_000)
    assert see(3.0, 310, hold).delivered == 10
    assert see(4.0, 310, hold).delivered == 0  # what was before the outage tells nothing
    assert see(5.0, 0, outbox_id="b") is None
