import json
import os
from dataclasses import fields
from datetime import UTC, datetime

import pytest

from perqueue import Stats
from perqueue._clock import Clock
from perqueue._status import crossing
from perqueue.cli._print import age, printable
from perqueue.sandbox import BadToken, Hang, Refuse, Status

EXTRAS = {"discarded", "drained", "drainer_pid", "month_end", "origin", "outbox"}


@pytest.fixture
def status(perqueue):
    return lambda: json.loads(perqueue("status", "--json").output)


def test_json_has_the_names_of_stats(status, make_queue, outbox, per):
    """`status --json` has the fields of `stats()` by their names, and a few that describe the file."""
    queue = make_queue(drain=False)
    queue.record("GROUP_A", "USER_1")
    shown = status()
    assert set(shown) == {field.name for field in fields(Stats)} | EXTRAS
    assert (shown["pending"], shown["delivered"], shown["rejected"]) == (1, 0, 0)
    assert 0 <= shown["oldest_pending_age"] < 60
    assert (shown["state"], shown["drained"], shown["drainer_pid"]) == ("off", False, None)
    assert (shown["origin"], shown["outbox"]) == (per.url, str(outbox))


def test_it_shows_who_delivers(status, perqueue, make_queue, until):
    """`status` shows the process that delivers, and that it has nothing to do."""
    queue = make_queue()
    queue.record("GROUP_A", "USER_1").wait()
    until(lambda: queue.stats().pending == 0)
    shown = status()
    assert (shown["state"], shown["drained"], shown["drainer_pid"]) == ("idle", True, os.getpid())
    assert f"process {os.getpid()}" in perqueue("status").output
    queue.close()
    assert status()["state"] == "off"


def test_it_shows_what_is_in_flight(status, make_queue, per, until):
    """`status --json` has what the draining process, another one, waits for: until it ends or is killed."""
    per.set_fault(Hang())
    queue = make_queue(max_in_flight=7, exit_timeout=0.1)
    queue.record("GROUP_A", "USER_1")
    until(lambda: status()["in_flight"] == 1)
    assert status()["in_flight_limit"] in range(1, 8)
    queue.close()
    assert (status()["in_flight"], status()["in_flight_limit"]) == (0, 0)


def test_looking_takes_the_lock_from_nobody(status, make_queue):
    """`status` leaves the drain lock free: a queue that starts next is elected at once."""
    make_queue().record("GROUP_A", "USER_1").wait()
    for _ in range(5):
        status()
    other = make_queue()
    other.record("GROUP_A", "USER_2").wait()


def test_why_nothing_arrives(status, perqueue, make_queue, per, until):
    """`status` shows why a process backs off, and until when, though it is another process."""
    per.set_fault(Status(503))
    make_queue().record("GROUP_A", "USER_1")
    until(lambda: status()["state"] == "backing_off")
    shown = status()
    assert "503" in shown["reason"]
    assert shown["resumes_at"].startswith("20")
    lines = dict(line.split(maxsplit=1) for line in perqueue("status").output.splitlines())
    assert lines["state"].startswith("backing off: HTTP 503")
    assert lines["pending"].startswith("1, the oldest for ")


def test_a_pause_outlives_its_process(status, make_queue, per, perqueue):
    """`status` shows that the token was refused after the process that found out has gone."""
    per.set_fault(BadToken())
    make_queue(drain=False).record("GROUP_A", "USER_1")
    assert perqueue("drain").exit_code == 1
    shown = status()
    assert (shown["state"], shown["drained"]) == ("paused", False)
    assert "bad token" in shown["reason"]


def test_what_is_rejected_is_pointed_at(perqueue, make_queue, per, until):
    """`status` says where to look when something was rejected."""
    per.set_fault(Refuse("no"), times=1)
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().rejected == 1)
    assert "perqueue rejected list" in perqueue("status").output


def test_an_outbox_of_another_origin_is_shown_all_the_same(perqueue, make_queue):
    """`status` needs no token and no right base URL: it only looks."""
    make_queue(drain=False)
    result = perqueue("status", PER_BASE_URL="https://api.useper.com", PER_ACTIVITY_TOKEN=None)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"),
        (7800, "2 h 10 min"), (86400, "1 d"), (100_000_000, "1,157 d 9 h"),
    ],
)  # fmt: skip
def test_ages_are_for_humans(seconds, words):
    """An age has at most two units."""
    assert age(seconds) == words


def test_nothing_printed_commands_the_terminal():
    """What comes from outside is printed without control characters; letters of any script stay."""
    assert printable("Zoë 漢字\x1b[2J\n\u202e") == "Zoë 漢字\\x1b[2J\\n\\u202e"


@pytest.mark.parametrize(
    ("pending", "now", "end"),
    [
        (1, datetime(2026, 2, 27, 23, 59, tzinfo=UTC), None),
        (1, datetime(2026, 2, 28, 0, 0, tzinfo=UTC), datetime(2026, 3, 1, tzinfo=UTC)),
        (1, datetime(2026, 12, 31, 23, 59, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (1, datetime(2027, 1, 1, tzinfo=UTC), None),
        (0, datetime(2026, 12, 31, 23, 59, tzinfo=UTC), None),
    ],
)
def test_what_is_about_to_cross_the_end_of_the_month(pending, now, end):
    """Something pending in the last 24 hours of a month (UTC) is about to be counted in the next one."""
    assert crossing(pending, int(now.timestamp() * 1000)) == end


def test_status_warns_at_the_end_of_the_month(status, perqueue, make_queue, monkeypatch):
    """`status` says how many are about to cross the end of the month, and which month will count them."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    late = datetime(2030, 11, 30, 21, 0, tzinfo=UTC)
    monkeypatch.setattr("perqueue._clock.SYSTEM_CLOCK", Clock(wall=late.timestamp))
    assert status()["month_end"] == "2030-12-01T00:00:00.000Z"
    assert "warning    1 pending, and the month ends in 3 h" in perqueue("status").output
    assert "counts in December" in perqueue("status").output
