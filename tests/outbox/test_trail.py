"""The audit trail tells what became of each activity, and nothing that is not so."""

import os
import sqlite3
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from perqueue import ActivityRecord, ConfigurationError, OutboxError, PerQueue, QueueClosed
from perqueue._activity import Event, Settlement, checksum
from perqueue._audit import history
from perqueue._outbox import Filter, OperatorOutbox
from perqueue._outbox.file_trail import _ATTEMPTED, _RELEVANT, _SLICE, FileTrail
from perqueue._outbox.reader import SLICE
from perqueue._outbox.salvage import salvage
from perqueue._outbox.trail import CLOCK_SLACK_MS
from perqueue.sandbox import Refuse, Status
from tests.helpers import Child

ORIGIN = "https://api.useper.com"
NOW = 1_700_000_000_000


@pytest.fixture
def path(outbox):
    return outbox


@pytest.fixture
def opened(path):
    with closing(OperatorOutbox(path, ORIGIN)) as each:
        yield each


def fill(path, times):
    """Record an activity at each time, as fast as SQLite can."""
    rows = [("GROUP", f"USER_{n}", "TYPE", at, checksum("GROUP", f"USER_{n}", "TYPE", at)) for n, at in times]
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO perqueue_activity (billing_id, user_id, activity_type_id, recorded_at, checksum)"
            " VALUES (?, ?, ?, ?, ?)",
            rows,
        )


def settle(opened, activity, event, at=NOW, **more):
    settlement = Settlement(activity=activity, event=event, answered_at=at, **more)
    opened.settle([settlement], drained_through=0, refusals=(0, None))


def damage(path, statement):
    with closing(sqlite3.connect(path, timeout=5)) as connection, connection:
        connection.execute(statement)


def test_history_tells_each_fate(per, make_queue, until):
    """Accepted, rejected and pending ones are told with their times, attempts, transaction ID and reason."""
    per.set_fault(Status(503), times=1)
    queue = make_queue()
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    queue.record("GROUP_A", "USER_1").wait()
    per.set_fault(Refuse("unknown_user"), times=1)
    queue.record("GROUP_A", "USER_2")
    until(lambda: queue.stats().rejected == 1)
    per.go_down()
    queue.record("GROUP_A", "USER_3")
    accepted, rejected, pending = queue.history()
    [received] = per.activities
    assert (accepted.state, accepted.transaction_id) == ("accepted", received.transaction_id)
    assert (accepted.attempts, accepted.reason) == (2, None)
    assert before <= accepted.recorded_at <= accepted.settled_at <= datetime.now(UTC)
    assert accepted.settled_at.utcoffset() == timedelta(0)
    assert (rejected.state, rejected.reason, rejected.attempts) == ("rejected", "unknown_user", 1)
    assert (pending.state, pending.settled_at, pending.transaction_id) == ("pending", None, None)
    assert [record.id for record in (accepted, rejected, pending)] == [1, 2, 3]
    with pytest.raises(AttributeError):
        accepted.state = "pending"


def test_history_says_what_the_view_says(opened, path):
    """Every field is that of the view `perqueue_activity_log`, whatever the state."""
    for n in range(6):
        opened.append("GROUP", f"USER_{n}", "TYPE", NOW + n)
    _, accepted, rejected, discarded, failed, damaged = opened.claim(0, 10)
    settle(opened, accepted, Event.DEFER, reason="HTTP 503")
    settle(opened, accepted, Event.ACCEPT, NOW + 70, transaction_id="T")
    settle(opened, rejected, Event.REJECT, reason="no")
    settle(opened, discarded, Event.REJECT, reason="no")
    settle(opened, failed, Event.DEFER, reason="HTTP 502", not_before=NOW)
    opened.discard([discarded.id])
    opened._quarantine([(damaged.id, NOW, "unreadable")])
    names = list(ActivityRecord.__dataclass_fields__)
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(f"SELECT {', '.join(names)} FROM perqueue_activity_log ORDER BY id")
        logged = [dict(zip(names, row, strict=True)) for row in rows]
    told = [{name: getattr(record, name) for name in names} for record in history(path)]
    for record in told:
        for name in ("recorded_at", "settled_at"):
            moment = record[name]
            record[name] = moment and f"{moment.isoformat(timespec='milliseconds')[:-6]}Z"
    assert told == logged
    assert {record["state"] for record in told} == {
        "pending", "accepted", "rejected", "discarded", "damaged"
    }  # fmt: skip


def test_history_takes_filters_together(opened, path):
    """What is told fits every filter, in the order of recording, from `after` on and up to `limit`."""
    for n in range(40):
        opened.append(f"GROUP_{n % 2}", f"USER_{n % 4}", f"TYPE_{n % 8}", NOW + n * 1000)

    def ids(**wanted):
        return [record.id - 1 for record in history(path, **wanted)]

    def at(n):
        return datetime.fromtimestamp(NOW / 1000 + n, UTC)

    assert ids() == list(range(40))
    assert ids(user_id="USER_2") == list(range(2, 40, 4))
    assert ids(user_id="USER_2", billing_id="GROUP_1") == []
    assert ids(billing_id="GROUP_0", activity_type_id="TYPE_6") == [6, 14, 22, 30, 38]
    assert ids(since=at(5), until=at(8)) == [5, 6, 7]
    assert ids(since=at(37).isoformat()) == [37, 38, 39]
    assert ids(user_id="USER_0", after=5, limit=2) == [8, 12]
    assert ids(after=40) == ids(user_id="nobody") == []


def test_wrong_filters_are_refused(make_queue):
    """A filter that cannot be meant is a `ConfigurationError`; a closed queue says that it is closed."""
    queue = make_queue(drain=False)
    for wrong in (
        {"user_id": 7}, {"since": "yesterday"}, {"since": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"user_id": "\ud800"}, {"limit": 0}, {"limit": True}, {"after": -1},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            queue.history(**wrong)
    queue.close()
    with pytest.raises(QueueClosed):
        queue.history()
    with pytest.raises(QueueClosed):
        queue.reconcile()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE perqueue_activity SET user_id = 'OTHER'", "row"),
        ("UPDATE perqueue_activity SET recorded_at = recorded_at + 4611686018427387904", "row"),
        ("UPDATE perqueue_activity SET billing_id = CAST(x'ff' AS TEXT)", "row"),
        ("UPDATE perqueue_settlement SET state = 2", "outcome"),
        ("UPDATE perqueue_settlement SET transaction_id = 'OTHER'", "outcome"),
    ],
)
def test_damaged_rows_are_told_as_damaged(opened, path, statement, says):
    """A row or an outcome that is not what was stored is shown as damaged, and as nothing else."""
    opened.append("GROUP", "USER", "TYPE", NOW)
    settle(opened, opened.claim(0, 1)[0], Event.ACCEPT, transaction_id="T")
    assert [record.state for record in history(path)] == ["accepted"]
    damage(path, statement)
    [record] = history(path)
    assert record.state == "damaged"
    assert f"stored {says} does not match" in record.reason
    record.billing_id.encode()  # can be printed


def test_a_file_that_cannot_be_read_is_told(opened, path):
    """Where a page is unreadable there is an `OutboxError`, and no half of a history."""
    for n in range(500):
        opened.append("GROUP", f"USER_{n}", "TYPE", NOW)
    opened.close()
    content = bytearray(path.read_bytes())
    content[20 * 1024 : 24 * 1024] = b"\xff" * 4096
    path.write_bytes(content)
    with pytest.raises(OutboxError, match="perqueue doctor"):
        history(path)


@pytest.mark.parametrize("every", [1, 3, 7])
def test_no_activity_of_a_time_is_missed(opened, path, every):
    """A search by time finds what a full look finds, though the clock went back and forth by a day."""
    assert opened.position().last_id == 0
    hour = 3_600_000
    times = [NOW + n * hour - (n // every % 2) * (CLOCK_SLACK_MS - hour) for n in range(80)]
    fill(path, enumerate(times))
    with FileTrail(path) as reader:
        for start in range(NOW - 30 * hour, NOW + 90 * hour, hour):
            for end in (start + 1, start + 10 * hour):
                found = reader.trace(Filter(since=start, until=end), 0, 1000)
                assert [each.recorded_at for each in found] == [at for at in times if start <= at < end]


def test_a_time_is_found_without_reading_what_lies_before_it(opened, path):
    """Of a large outbox, a search by time touches what lies within a day of it, and a few rows more."""
    fill(path, [(n, NOW + n * 60_000) for n in range(20_000)])
    asked = []

    class Counting(FileTrail):
        def rows(self, query, values=()):
            asked.append(found := super().rows(query, values))
            return found

    since = NOW + 15_000 * 60_000
    with Counting(path) as reader:
        first, last = reader.bounds(since, since + 60_000)
        assert [each.id for each in reader.trace(Filter(since=since, until=since + 60_000), 0, 10)] == [
            15_001
        ]
    assert last - first <= 2 * 1440 + 10
    assert sum(map(len, asked)) < 1000


def test_every_query_goes_by_the_key(opened, path):
    """No query scans a table: each looks up a range of keys, and the users have no index to keep."""
    filters, _ = Filter("B", "U", "T", 1, 2).sql()
    with closing(sqlite3.connect(path)) as connection:
        for query in (_SLICE.format(filters=filters), _RELEVANT, _ATTEMPTED):
            plan = connection.execute(f"EXPLAIN QUERY PLAN {query}", [1] * query.count("?")).fetchall()
            steps = [step for *_, step in plan]
            assert steps
            assert [step for step in steps if step.startswith(("SCAN", "USE TEMP"))] == []


def test_recording_goes_on_during_a_long_look(opened, path):
    """Between two steps of a history the file is free: others record, and the log can be emptied."""
    fill(path, [(n, NOW) for n in range(3 * SLICE)])
    with FileTrail(path) as reader:
        steps = reader.slices(0, 10 * SLICE)
        for _ in range(2):
            next(steps)
            opened.append("GROUP", "USER", "TYPE", NOW)
            assert opened._usable().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        assert len(list(steps)) == 2


def test_a_reader_survives_a_fork(opened, path):
    """A fork between two steps of a history closes its connection on both sides, and it goes on."""
    opened.append("GROUP", "USER", "TYPE", NOW)
    with FileTrail(path) as reader:
        assert len(reader.trace(Filter(), 0, 10)) == 1
        pid = os.fork()
        if not pid:
            os._exit(0 if reader._connection is None and len(reader.trace(Filter(), 0, 10)) == 1 else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert len(reader.trace(Filter(), 0, 10)) == 1
    assert opened.append("GROUP", "USER", "TYPE", NOW) == 2


def test_every_attempt_is_told(opened, path):
    """One activity is told with every request for it, the one that settled it last."""
    opened.append("GROUP", "USER", "TYPE", NOW)
    [activity] = opened.claim(0, 1)
    settle(opened, activity, Event.DEFER, NOW + 100, duration_ms=20, reason="HTTP 503")
    settle(opened, activity, Event.REJECT, NOW + 200, duration_ms=30, reason="no")
    opened.requeue([1])
    settle(opened, activity, Event.ACCEPT, NOW + 300, duration_ms=40, transaction_id="T")
    with FileTrail(path) as reader:
        one, tries = reader.trace_one(1)
        assert reader.trace_one(2) is None
    assert one.attempts == len(tries) == 3
    assert [tuple(each) for each in tries] == [
        (NOW + 80, 20, "HTTP 503"),
        (NOW + 170, 30, "no"),
        (NOW + 260, 40, None),
    ]


def test_attempts_are_told_in_python(per, make_queue):
    """`attempts()` has each request for an activity, with time and reason; none for one that is not there."""
    per.set_fault(Status(503), times=1)
    queue = make_queue()
    queue.record("GROUP_A", "USER_1").wait()
    failed, accepted = queue.attempts(1)
    [record] = queue.history()
    assert record.attempts == 2
    assert (failed.reason, accepted.reason) == ("HTTP 503", None)
    assert record.recorded_at <= failed.attempted_at < accepted.attempted_at <= record.settled_at
    assert queue.attempts(2) == []
    with pytest.raises(ConfigurationError):
        queue.attempts("1")


def test_history_beside_a_busy_recorder(make_queue):
    """Histories asked for while other threads record are each a true beginning of the next."""
    queue = make_queue(drain=False)

    def record():
        for _ in range(700):
            queue.record("GROUP", "USER")

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    lengths = []
    while any(thread.is_alive() for thread in threads):
        records = queue.history(limit=None)
        assert [record.id for record in records] == list(range(1, len(records) + 1))
        lengths.append(len(records))
    for thread in threads:
        thread.join()
    assert lengths == sorted(lengths)


def test_what_a_salvage_made_has_an_incomplete_trail(opened, path, tmp_path):
    """Outcomes may be lost without a gap that shows it: what is before a salvage is never called complete."""
    opened.append("GROUP", "USER", "TYPE", NOW)
    settle(opened, opened.claim(0, 1)[0], Event.ACCEPT, transaction_id="T")
    opened.close()
    damage(path, "DELETE FROM perqueue_settlement")
    found = salvage(path, tmp_path / "new.db")
    assert (found.pending, found.missing, found.damaged) == (1, 0, 0)
    with FileTrail(tmp_path / "new.db") as reader:
        [(lost,)] = reader.rows("SELECT trail_lost_through FROM perqueue_drain")
    assert lost > NOW


@pytest.mark.parametrize("killed_after", range(4))
def test_a_migration_that_is_killed_is_finished_by_the_next(path, killed_after):
    """Killed between any two of its steps, a migration leaves a file that the next process finishes."""
    age(path)
    script = """
        from perqueue._outbox import schema, OperatorOutbox
        from pathlib import Path
        steps = iter(range(int(sys.argv[2])))
        def maybe_die(f):
            def step(*a, **k):
                if next(steps, None) is None:
                    os.kill(os.getpid(), 9)
                return f(*a, **k)
            return step
        kind = type(schema.migrations)
        kind._record_applied = maybe_die(kind._record_applied)
        schema.Database.atomic = maybe_die(schema.Database.atomic)
        OperatorOutbox(Path(sys.argv[1]), None).close()
        """
    with Child(script, path, killed_after, measured=False) as child:
        assert child.wait() == -9
    with closing(OperatorOutbox(path, None)) as opened:
        assert opened.position().last_id == 1
        assert opened.append("GROUP", "USER", "TYPE", NOW) == 2
    assert [record.id for record in history(path)] == [1, 2]


def age(path):
    """Make a file of the first schema, with one activity."""
    with closing(OperatorOutbox(path, ORIGIN)) as opened:
        opened.append("GROUP", "USER", "TYPE", NOW)
    for column in ("trail_lost_through", "in_flight", "in_flight_limit", "rate_limit"):
        damage(path, f"ALTER TABLE perqueue_drain DROP COLUMN {column}")
    damage(path, "DELETE FROM perqueue_migrations WHERE name <> 'create_outbox'")
    damage(path, "UPDATE perqueue_outbox SET schema_version = 1")


def test_an_older_outbox_is_brought_up_to_date(path, per, make_queue):
    """A file of the first schema is migrated when it is next opened, by the command line, too."""
    with closing(OperatorOutbox(path, per.url)) as opened:
        opened.append("GROUP", "USER", "TYPE", NOW)
    damage(path, "ALTER TABLE perqueue_drain DROP COLUMN trail_lost_through")
    damage(path, "DELETE FROM perqueue_migrations WHERE name = 'remember_what_was_pruned'")
    damage(path, "UPDATE perqueue_outbox SET schema_version = 1")
    damage(path, "UPDATE perqueue_drain SET pruned = 1, accepted = 1")
    with closing(OperatorOutbox(path, None, create=False)) as opened:
        assert opened.position().last_id == 1
    with FileTrail(path) as reader:
        [(lost,)] = reader.rows("SELECT trail_lost_through FROM perqueue_drain")
    assert lost > NOW  # what was pruned before may have been settled at any time
    queue = make_queue(path, drain=False)
    assert isinstance(queue, PerQueue)
    assert len(queue.history()) == 1


def test_an_attempt_is_of_every_moment_that_it_lasted(opened, path):
    """A request is found in each period in which it was under way, whenever it began and ended."""
    number = opened.append("GROUP", "USER", "TYPE", NOW - 5000)
    (activity,) = opened.claim(0, 1)
    settle(opened, activity, Event.DEFER, duration_ms=1000, reason="no answer")
    with FileTrail(path) as trail:

        def found(since, until):
            return [each for each, _ in trail.attempted(1, 9, NOW + since, NOW + until)]

        assert found(-500, 500) == found(-2000, -500) == found(-600, -400) == [number]
        assert found(0, 9) == found(-1999, -1000) == [number]
        assert found(1, 9) == found(-2000, -1001) == []
