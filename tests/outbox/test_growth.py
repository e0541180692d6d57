"""However much an outbox holds, its daily work takes as many steps, and each activity as much of the disk."""

import random
import sqlite3
from contextlib import closing
from itertools import count

import pytest

from perqueue import OutboxFull
from perqueue._activity import Event, Settlement, checksum
from perqueue._outbox import SQLiteOutbox, pruning
from perqueue._outbox.damage import settlement_checksum
from tests.helpers import until

ORIGIN = "https://api.useper.com"
NOW = 1_700_000_000_000
LATER = NOW + 3_600_000
GROUP, KIND = "G" * 30, "T" * 30
KEY = (GROUP, "U" * 30, KIND)
TRANSACTION = "35434hjgghf46h34jh"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outbox.db"


def outcome(activity, event=Event.ACCEPT, not_before=None):
    return Settlement(
        activity=activity,
        event=event,
        answered_at=NOW,
        duration_ms=20 + activity.id % 200,
        transaction_id=TRANSACTION if event is Event.ACCEPT else None,
        reason=None if event is Event.ACCEPT else "a reason",
        not_before=not_before,
    )


def deliver(outbox):
    """Settle everything as a drain does that has 32 requests in flight, answered in any order."""
    cursor, flying, chance = outbox.position().drained_through, [], random.Random(1)
    while True:
        flying += outbox.claim(cursor, 64 - len(flying))
        if not flying:
            return
        cursor = max(cursor, *(activity.id for activity in flying))
        chance.shuffle(flying)
        landed, flying = flying[:32], flying[32:]
        through = min((activity.id for activity in flying), default=cursor + 1) - 1
        outbox.settle([outcome(each) for each in landed], drained_through=through, refusals=(0, None))


def grow(path, many):
    """Make an outbox of so many accepted, refused, waiting and pending activities; return its watermark."""
    SQLiteOutbox(path, ORIGIN).close()
    accepted, refused, waiting, pending = (range(1 + part * many, 1 + (part + 1) * many) for part in range(4))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO perqueue_activity VALUES (?, ?, ?, ?, ?, ?)",
            [(i, *KEY, NOW, checksum(*KEY, NOW)) for i in range(1, pending.stop)],
        )
        insert = "INSERT INTO perqueue_settlement VALUES (?, ?, ?, 20, 1, ?, ?, ?, ?)"
        settled = [(i, 1, NOW, TRANSACTION, None) for i in accepted]
        settled += [(i, 2, NOW, None, "a reason") for i in refused]
        connection.executemany(
            insert,
            [(*row, None if row[1] == 1 else row[0] - many, settlement_checksum(*row)) for row in settled],
        )
        connection.executemany(
            "INSERT INTO perqueue_retry VALUES (?, 1, ?, 'a reason')",
            [(i, NOW if i == waiting.start else LATER + i) for i in waiting],
        )
        connection.executemany(
            "INSERT INTO perqueue_attempt (activity_id, attempted_at, duration_ms, reason)"
            " VALUES (?, 0, 20, 'a reason')",
            [(i,) for i in (*refused, *waiting)],
        )
        connection.executemany(
            "INSERT INTO perqueue_coalesced VALUES (?, ?, ?, ?, ?, ?)",
            [(LATER, NOW, GROUP, f"USER_{i}", KIND, i) for i in pending],
        )
        connection.execute(
            "UPDATE perqueue_drain SET accepted = ?, rejected = ?, rejections = ?, drained_through = ?",
            (many, many, many, waiting.stop - 1),
        )
    return pending.start - 1


def steps(path, many):
    """Return how many steps of SQLite's virtual machine each operation takes on an outbox so large."""
    through = grow(path, many)
    taken = {}
    with closing(SQLiteOutbox(path, ORIGIN, max_pending=1)) as outbox:
        with outbox._reading() as connection:
            pass

        def measure(name, operation):
            ticks = count()
            connection.set_progress_handler(lambda: next(ticks) < 0, 1)
            result = operation()
            connection.set_progress_handler(None, 0)
            taken[name] = next(ticks)
            return result

        def refused():
            with pytest.raises(OutboxFull):
                outbox.append(*KEY, NOW)

        def settle(activity, event=Event.ACCEPT, not_before=None):
            outbox.settle([outcome(activity, event, not_before)], drained_through=0, refusals=(0, None))

        outbox._last_id = outbox.position().last_id
        measure("a full outbox's refusal", refused)
        outbox._max_pending = 10**9
        measure("append", lambda: outbox.append(*KEY, NOW))
        measure("append once", lambda: outbox.append_once(KEY, (NOW, LATER), NOW))
        claimed = measure("claim", lambda: outbox.claim(through, 20))
        due = measure("claim due", lambda: outbox.claim_due(NOW, NOW + 2 * LATER, 20, ()))
        assert [activity.id for activity in due] == [2 * many + 1]
        measure("claim waiting", lambda: outbox.claim_waiting(0, 20))
        measure("next due", outbox.next_due)
        measure("accept", lambda: settle(claimed[0]))
        measure("refuse", lambda: settle(claimed[1], Event.REJECT))
        measure("defer", lambda: settle(claimed[2], Event.DEFER, NOW))
        measure("position", outbox.position)
        measure("count", lambda: outbox.count_pending(2**40, 50))
        measure("outcomes", lambda: outbox.settled([1, many, 3 * many]))
        measure("reason", lambda: outbox.last_reason(2 * many))
        measure("refusals", lambda: outbox.rejected_since(many, 20))
        measure("expire", lambda: outbox.expire(NOW, 20))
        measure("prune", lambda: outbox.prune(NOW + 1, 10**9, 20))
        measure("keep", lambda: outbox.prune(NOW - 1, 10**9, 20))
    return taken


def test_no_operation_takes_longer_for_what_is_stored(tmp_path):
    """Recording, claiming, settling, counting and pruning take as many steps whatever backlog and history."""
    small, large = steps(tmp_path / "small.db", 150), steps(tmp_path / "large.db", 3000)
    assert large == pytest.approx(small, rel=0.02, abs=2)


def test_an_activity_takes_little_of_the_disk(path):
    """With 30-character IDs a pending activity takes at most 130 bytes, a delivered one at most 200."""
    many, before = 20_000, 30_000_000
    SQLiteOutbox(path, ORIGIN).close()
    with closing(sqlite3.connect(path)) as connection, connection:  # numbers take more room with the years
        connection.execute("INSERT INTO perqueue_activity VALUES (?, 'G', 'U', 'T', 0, 0)", (before,))
        connection.execute(
            "INSERT INTO perqueue_settlement VALUES (?, 1, 0, 0, 1, NULL, NULL, NULL, 0)", (before,)
        )
        connection.execute(
            "UPDATE perqueue_drain SET accepted = ?, drained_through = ?, pruned = ?",
            (before, before, before - 1),
        )
    empty = path.stat().st_size
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox:
        for n in range(many):
            outbox.append(GROUP, f"{n:030}", KIND, NOW)
    assert path.stat().st_size - empty <= 130 * many
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox:
        deliver(outbox)
        assert outbox.position().pending == 0
    assert path.stat().st_size - empty <= 200 * many


def test_what_is_pruned_makes_room(path):
    """The file does not grow while as many are pruned as recorded: SQLite uses freed pages again."""

    def work():
        with closing(SQLiteOutbox(path, ORIGIN)) as outbox:
            for _ in range(3000):
                outbox.append(*KEY, NOW)
            deliver(outbox)
            while outbox.prune(NOW + 1, 10**9, 100):
                pass
        return path.stat().st_size

    first = work()
    assert max(work() for _ in range(3)) <= 1.05 * first


def test_two_that_prune_the_same_count_it_once(path, monkeypatch):
    """A process that was stopped while it pruned does not spoil the books of the one that took over."""
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox, closing(SQLiteOutbox(path, ORIGIN)) as other:
        for _ in range(50):
            outbox.append(*KEY, NOW)
        deliver(outbox)
        look = outbox._look

        def stopped(limit):
            looked = look(limit)
            other.prune(NOW + 1, 10**9, 30)
            return looked

        monkeypatch.setattr(outbox, "_look", stopped)
        outbox.prune(NOW + 1, 10**9, 40)
    with closing(sqlite3.connect(path)) as reader:
        kept, rows = reader.execute(
            "SELECT accepted - pruned, (SELECT count(*) FROM perqueue_settlement) FROM perqueue_drain"
        ).fetchone()
    assert kept == rows == 10


def test_one_that_was_stopped_spares_the_highest_of_today(path, monkeypatch):
    """Whatever is recorded and settled while a process that prunes is stopped, no ID is given twice."""
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox, closing(SQLiteOutbox(path, ORIGIN)) as other:
        for _ in range(3):
            outbox.append(*KEY, NOW)
        deliver(outbox)
        look = pruning.one_row

        def stopped(*args):
            looked = look(*args)
            other.append(*KEY, NOW)
            deliver(other)
            return looked

        monkeypatch.setattr(pruning, "one_row", stopped)
        outbox.prune(NOW + 1, 10**9, 40)
        assert other.append(*KEY, NOW) == 5


def test_pruning_spares_what_lies_between(path):
    """Only accepted activities are pruned, however pending and refused ones lie among them (invariant 3)."""
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox:
        for _ in range(60):
            outbox.append(*KEY, NOW)
        chance = random.Random(2)
        claimed = outbox.claim(0, 60)
        kinds = {each.id: chance.choice(["accept", "accept", "reject", "pending"]) for each in claimed}
        settled = [outcome(each, Event(kinds[each.id])) for each in claimed if kinds[each.id] != "pending"]
        outbox.settle(settled, drained_through=0, refusals=(0, None))
        while outbox.prune(NOW + 1, 10**9, 7):
            pass
    with closing(sqlite3.connect(path)) as reader:
        left = [i for (i,) in reader.execute("SELECT id FROM perqueue_activity ORDER BY id")]
    assert left == [i for i, kind in kinds.items() if kind != "accept" or i == 60]


def test_a_sweep_goes_on_while_nothing_else_happens(make_queue, outbox, monkeypatch):
    """An idle drain deletes what is old as quickly as a busy one."""
    monkeypatch.setattr("perqueue._delivery.drain._MOST_KEPT", 10)
    monkeypatch.setattr("perqueue._delivery.drain._PRUNE_INTERVAL", 0.2)
    queue = make_queue()
    for n in range(600):
        queue.record("GROUP", f"USER_{n}")
    queue.flush(30)
    with closing(sqlite3.connect(outbox)) as reader:
        pruned = "SELECT pruned FROM perqueue_drain"
        until(lambda: reader.execute(pruned).fetchone()[0] == 590, "everything old is gone", 10)
