import json
import sqlite3
import time
from contextlib import closing

import pytest

from perqueue._outbox import Hold, Load, OperatorOutbox
from perqueue._outbox.look import FileOnlooker
from perqueue.cli._check import Limits, _verdict
from perqueue.cli._health import judge
from perqueue.cli._sight import Sight, fields, see


@pytest.fixture
def check(perqueue):
    """Run the probe: its exit code and its line."""

    def run(*options):
        result = perqueue("status", "--check", *options)
        assert (result.stderr, result.stdout.count("\n"), result.stdout[-1]) == ("", 1, "\n")
        return result.exit_code, result.stdout.strip()

    return run


def _now():
    return time.time_ns() // 1_000_000


@pytest.fixture
def stored(outbox, per):
    """An outbox that nobody drains, to put things into."""
    with closing(OperatorOutbox(outbox, per.url)) as opened:
        yield opened


def _record(stored, age, count=1):
    for number in range(count):
        stored.append("GROUP_A", f"USER_{number}", "TYPE", _now() - age * 1000)


def test_nothing_pending_is_healthy(check, stored):
    """A probe of an outbox with nothing pending returns 0, though nobody drains."""
    assert check() == (0, "healthy: idle: nothing is pending, and nobody drains")


def test_too_old_is_unhealthy(check, stored):
    """A probe returns 1 when the oldest has been pending for longer than it may, five minutes by default."""
    _record(stored, age=200)
    assert check()[0] == 0
    code, line = check("--max-age", "3m")
    assert code == 1
    assert line.startswith(
        "unhealthy: 1 pending, the oldest for 3 min (--max-age 3 min); nobody drains -> start"
    )
    _record(stored, age=100)
    assert (check("--max-age", "1d")[0], check("--max-age", "1h")[0], check("--max-age", "30s")[0]) == (
        0,
        0,
        1,
    )
    stored.append("GROUP_A", "USER_1", "TYPE", _now())
    assert check("--max-age", "0s")[0] == 1


def test_the_default_age_is_five_minutes(check, stored):
    """Without --max-age, what is older than five minutes is unhealthy."""
    _record(stored, age=320)
    assert check()[0] == 1


def test_too_many_is_unhealthy(check, stored):
    """A probe returns 1 when more is pending than may be."""
    _record(stored, age=1, count=3)
    assert check("--max-pending", "3")[0] == 0
    code, line = check("--max-pending", "2")
    assert code == 1
    assert "3 pending" in line
    assert "--max-pending 2" in line


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("bad_token", 1, "paused: bad token: Per says why -> give the drainer a token"),
        ("refused", 1, "paused: everything is refused: Per says why -> as a rule the activity type is wrong"),
        ("backing_off", 0, "nobody drains; who did backed off because why"),
        ("retry_after", 0, "nobody drains"),
    ],
)
def test_a_pause_is_unhealthy_and_an_outage_is_not(check, stored, kind, code, says):
    """A probe returns 1 at once for what waiting will not mend; an outage has its time."""
    stored.set_hold(Hold(kind=kind, reason="why", until=_now() + 60_000, wait_ms=60_000))
    assert check()[0] == 0  # it holds up nothing
    _record(stored, age=1)
    result, line = check()
    assert result == code
    assert says in line


def test_an_outage_that_lasts_is_unhealthy_with_its_reason(check, make_queue, per, until):
    """When the age is over the limit during an outage, the line says what Per answers and that it resumes."""
    from perqueue.sandbox import Status

    per.set_fault(Status(503))
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().state == "backing_off")
    until(lambda: queue.stats().oldest_pending_age > 0.01)
    code, line = check("--max-age", "0s")
    assert code == 1
    assert "because HTTP 503" in line
    assert "it resumes by itself" in line


def test_damage_is_unhealthy(check, stored, outbox):
    """A probe returns 1 when activities were found damaged, whatever else is well."""
    _record(stored, age=1)
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("UPDATE perqueue_drain SET damaged = 1, drained_through = 1")
    code, line = check()
    assert code == 1
    assert "1 damaged" in line
    assert "perqueue doctor" in line


def test_damage_that_is_known_is_given_up(check, stored, outbox):
    """With --max-damaged a probe is healthy in spite of so many, and unhealthy with one more."""
    _record(stored, age=1)
    _record(stored, age=1)
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("UPDATE perqueue_drain SET damaged = 2, drained_through = 2")
    assert check("--max-damaged", "2")[0] == 0
    code, line = check("--max-damaged", "1")
    assert code == 1
    assert "2 damaged or missing activities not delivered (--max-damaged 1)" in line


def test_a_missing_outbox_is_unhealthy_and_stays_missing(check, outbox):
    """A probe of a path without an outbox returns 1, and creates nothing."""
    code, line = check()
    assert code == 1
    assert line == f"unhealthy: there is no outbox at {outbox} -> is the path right?"
    assert list(outbox.parent.iterdir()) == []


@pytest.mark.parametrize(
    "content", [b"", b"notes", b"SQLite format 3\0" + b"x" * 5000], ids=["empty", "text", "torn"]
)
def test_what_cannot_be_read_is_unhealthy(check, outbox, content):
    """A probe of something that is no outbox, or none any more, returns 1, and leaves it as it is."""
    outbox.write_bytes(content)
    code, line = check()
    assert code == 1
    assert str(outbox) in line
    assert outbox.read_bytes() == content


def test_a_place_that_may_not_be_looked_at_is_unhealthy(check, outbox, monkeypatch):
    """A probe whose path leads through a file returns 1 with a line, not with a traceback."""
    outbox.write_bytes(b"")
    assert check("--outbox", f"{outbox}/activities.db")[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--watch"], ["--interval", "1"], ["--max-age", "5"], ["--max-age", "5 m"], ["--max-age", "-5m"],
        ["--max-age", "1w"], ["--max-pending", "-1"], ["--outbox", "mysql://somewhere/else"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_misuse_is_exit_code_2(perqueue, stored, options):
    """A wrong option is neither healthy nor unhealthy: the probe returns 2 and says so on stderr."""
    result = perqueue("status", "--check", *options)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_json_is_one_line_with_the_verdict(perqueue, stored, outbox):
    """`--check --json` prints one object: the verdict beside the fields of `status --json`."""
    _record(stored, age=400)
    result = perqueue("status", "--check", "--json")
    [line] = result.stdout.splitlines()
    shown = json.loads(line)
    assert (result.exit_code, shown["healthy"], shown["pending"]) == (1, False, 1)
    assert "nobody drains" in shown["why"]
    stored.close()
    outbox.unlink()
    shown = json.loads(perqueue("status", "--check", "--json").stdout)
    assert (shown["healthy"], shown["outbox"]) == (False, str(outbox))


def test_a_full_disk_is_unhealthy(stored, outbox):
    """No room on the file system is unhealthy before anything is old: recording fails already."""
    look = FileOnlooker(outbox).look()
    for room, healthy in ((10_000, False), (10_000_000, True), (None, True)):
        sight = Sight(path=outbox, now=_now(), drained=True, look=look, room=room)
        assert _verdict(sight, Limits(300, None)).healthy is healthy
    full = judge(Sight(path=outbox, now=_now(), drained=True, look=look, room=10_000))
    assert full.text == "disk full: 9 KiB are free where the outbox is"
    assert "free space" in full.remedy
    assert see(FileOnlooker(outbox), outbox).room > 0


def test_a_frozen_drainer_is_told_from_a_busy_one(stored, outbox):
    """Who holds the lock and ends no request for half a minute is said to be stalled, and not before."""
    now = _now()
    stored.append("GROUP_A", "USER_1", "TYPE", now)
    look = FileOnlooker(outbox).look()
    for later, words in ((29_000, "delivering"), (31_000, "stalled")):
        sight = Sight(path=outbox, now=now + later, drained=True, look=look)
        assert judge(sight).text.startswith(words)


def test_who_waits_on_its_own_account_is_named(stored, outbox):
    """When all that is pending failed while others got through, the time of the next try is said."""
    now = _now()
    stored.append("GROUP_A", "USER_1", "TYPE", now)
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("INSERT INTO perqueue_retry VALUES (1, 1, ?, 'HTTP 500')", (now + 60_000,))
        connection.execute("INSERT INTO perqueue_attempt VALUES (1, 1, ?, 5, 'HTTP 500')", (now,))
        connection.execute("UPDATE perqueue_drain SET drained_through = 1")
    sight = Sight(path=outbox, now=now, drained=True, look=FileOnlooker(outbox).look())
    assert judge(sight).text.startswith("retrying at ")
    assert judge(sight).text.endswith("what failed while others got through: HTTP 500")


def test_what_holds_up_nothing_is_not_told(stored, outbox):
    """A pause is told only while something is pending: it keeps nothing back."""
    look = FileOnlooker(outbox).look()
    paused = look._replace(
        position=look.position._replace(hold=Hold("bad_token", "why", _now() + 60_000, 60_000))
    )
    assert judge(Sight(path=outbox, now=_now(), drained=True, look=paused)).text.startswith("idle: ")


@pytest.mark.parametrize(
    ("since", "drained", "words"),
    [
        (20_000, True, "backing off, and trying again"),
        (40_000, True, "stalled"),
        (40_000, None, "backing off"),
    ],
)
def test_a_wait_is_no_standstill(stored, outbox, since, drained, words):
    """Who has waited is stalled half a minute after the wait, not after the last request, if it drains."""
    now = _now()
    stored.append("GROUP_A", "USER_1", "TYPE", now - 3_600_000)
    look = FileOnlooker(outbox).look()
    held = look._replace(
        position=look.position._replace(hold=Hold("backing_off", "why", now - since, 60_000))
    )
    assert judge(Sight(path=outbox, now=now, drained=drained, look=held)).text.startswith(words)


def test_a_clock_that_was_set_back_lengthens_no_wait(stored, outbox):
    """However far off the stored end of a wait is by this clock, it is told to be as long as it was."""
    now = _now()
    stored.append("GROUP_A", "USER_1", "TYPE", now + 3_600_000)
    look = FileOnlooker(outbox).look()
    held = look._replace(
        position=look.position._replace(hold=Hold("backing_off", "why", now + 3_600_000, 60_000))
    )
    sight = Sight(path=outbox, now=now, drained=True, look=held)
    assert "(1 min) because why" in judge(sight).text
    assert sight.oldest_age == 0


@pytest.mark.parametrize(
    ("drained", "seen"), [(True, (3, 10, 77)), (None, (3, 10, None)), (False, (0, 0, None))]
)
def test_who_was_killed_has_nothing_in_flight(stored, outbox, drained, seen):
    """What a drainer last wrote of its requests holds while it lives: a killed one cannot take it back."""
    look = FileOnlooker(outbox).look()
    left = look._replace(position=look.position._replace(load=Load(3, 10, None), drainer_pid=77))
    shown = fields(Sight(path=outbox, now=_now(), drained=drained, look=left))
    assert (shown["in_flight"], shown["in_flight_limit"], shown["drainer_pid"]) == seen
