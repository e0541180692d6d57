"""What a file of perqueue's own, set back while it is open, makes of what was claimed before."""

import sqlite3
from contextlib import closing

import pytest

from perqueue import OutboxError
from perqueue._activity import Event, Settlement
from perqueue._outbox import Hold, OperatorOutbox, claims, counts

ORIGIN = "http://127.0.0.1"
NOW = 1_700_000_000_000


@pytest.fixture
def outbox(outbox):
    """An outbox of one settled and one pending activity."""
    with closing(OperatorOutbox(outbox, ORIGIN)) as opened:
        for user in ("SETTLED", "PENDING"):
            opened.append("GROUP", user, "TYPE", NOW)
        settle(opened, opened.claim(0, 1), Event.ACCEPT)
        yield opened


@pytest.fixture
def restore(outbox, tmp_path):
    """Take the file back to how it was when the test began."""
    backup = tmp_path / "backup.db"
    copy(outbox.path, backup)
    return lambda: copy(backup, outbox.path)


def copy(source, target):
    with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target, timeout=20)) as other:
        one.backup(other)


def settle(outbox, claimed, event, **more):
    settlements = [
        Settlement(activity=each, event=event, answered_at=NOW, transaction_id="T", reason="no", **more)
        for each in claimed
    ]
    through = max((each.id for each in claimed), default=0)
    return outbox.settle(settlements, drained_through=through, refusals=(3, "no"), epoch=0)


def fates(outbox):
    with closing(sqlite3.connect(outbox.path)) as connection:
        query = "SELECT user_id, state, attempts FROM perqueue_activity_log ORDER BY id"
        return {user: (state, attempts) for user, state, attempts in connection.execute(query)}


@pytest.mark.parametrize(
    ("event", "more"),
    [(Event.ACCEPT, {}), (Event.REJECT, {}), (Event.DEFER, {}), (Event.DEFER, {"not_before": NOW + 9})],
)
def test_an_outcome_is_written_for_what_was_claimed_and_for_nothing_else(outbox, restore, event, more):
    """Neither an outcome nor an attempt nor a wait goes to what has the number of one that is gone."""
    for user in ("GONE", "GONE_TOO"):
        outbox.append("GROUP", user, "TYPE", NOW + 1)
    claimed = outbox.claim(1, 10)
    restore()
    outbox.append("GROUP", "AFTER", "TYPE", NOW + 2)
    settle(outbox, claimed, event, **more)
    state = {Event.ACCEPT: "accepted", Event.REJECT: "rejected"}.get(event, "pending")
    assert fates(outbox) == {"SETTLED": ("accepted", 1), "PENDING": (state, 1), "AFTER": ("pending", 0)}
    position = outbox.position()
    assert set(outbox.lost) == {3, 4}
    assert (position.pending, position.refusal_streak, position.drained_through) == (
        1 + (state == "pending"), 0, 1
    )  # fmt: skip
    assert {each.user_id for each in outbox.claim(position.drained_through, 9)} >= {"AFTER"}


def test_many_at_once_are_each_compared(outbox, restore):
    """Of a batch that one statement writes only those are left out that are not there."""
    kept = [outbox.append("GROUP", f"KEPT-{n}", "TYPE", NOW) for n in range(40)]
    backup = outbox.path.with_name("later.db")
    copy(outbox.path, backup)
    for n in range(40):
        outbox.append("GROUP", f"GONE-{n}", "TYPE", NOW)
    claimed = outbox.claim(1, 100)
    copy(backup, outbox.path)
    for n in range(20):
        outbox.append("GROUP", f"AFTER-{n}", "TYPE", NOW)
    settle(outbox, claimed, Event.ACCEPT)
    assert {user for user, (state, _) in fates(outbox).items() if state == "pending"} == {
        f"AFTER-{n}" for n in range(20)
    }
    assert outbox.position().accepted == 2 + len(kept)


def test_a_wait_that_the_file_knows_is_left_alone(outbox, restore):
    """Who waits on its own account under a number of one that is gone goes on waiting."""
    outbox.append("GROUP", "GONE", "TYPE", NOW)
    gone = outbox.claim(2, 1)
    restore()
    outbox.append("GROUP", "AFTER", "TYPE", NOW + 1)
    settle(outbox, outbox.claim(2, 1), Event.DEFER, not_before=NOW + 9)
    settle(outbox, gone, Event.ACCEPT)
    assert [each.user_id for each in outbox.claim_waiting(0, 9)] == ["AFTER"]


def test_each_set_back_is_noticed_once_and_nothing_else_is(outbox, restore):
    """Recording, settling, requeueing, pruning and pausing never look like one, in any process."""
    with closing(OperatorOutbox(outbox.path, None, create=False)) as other:
        for n in range(30):
            other.append("GROUP", f"USER-{n}", "TYPE", NOW)
            outbox.append("GROUP", f"OTHER-{n}", "TYPE", NOW)
            settle(outbox, outbox.claim(1 + 2 * n, 2), Event.REJECT if n % 3 else Event.ACCEPT)
            other.set_hold(Hold("backing_off", "no", NOW, 1))
            other.set_hold(None)
            other.request_probe()
            other.requeue([2 * n])
            while outbox.prune(2**62, 0, 50):
                pass
            assert (outbox.refusals(), other.refusals()) == (other.refusals(), outbox.refusals())
            outbox.settled([n])
        assert (outbox.epoch, other.epoch) == (0, 0)
        for times in (1, 2):
            restore()
            for each in (other, outbox):
                each.append("GROUP", "AFTER", "TYPE", NOW + times)
                each.position()
                each.claim(0, 5)
                assert each.epoch == times


def test_a_corrected_type_is_no_set_back(outbox):
    """An operator gives the newest activity, which was refused, another type: it is the same activity."""
    newest = outbox.append("GROUP", "USER", "WRONG", NOW)
    settle(outbox, outbox.claim(newest - 1, 1), Event.REJECT)
    outbox.position()
    with closing(OperatorOutbox(outbox.path, None, create=False)) as other:
        assert other.requeue([newest], "RIGHT") == 1
        assert (outbox.position().pending, other.position().pending) == (2, 2)
        assert (outbox.epoch, other.epoch) == (0, 0)


def test_an_older_copy_moved_into_its_place_is_noticed(outbox, restore, tmp_path):
    """The file may be replaced by another name for the past: after the error claims begin anew."""
    outbox.append("GROUP", "GONE", "TYPE", NOW)
    (tmp_path / "backup.db").replace(outbox.path)
    for end in ("-wal", "-shm"):
        outbox.path.with_name(f"{outbox.path.name}{end}").unlink(missing_ok=True)
    with pytest.raises(Exception, match="renamed or replaced"):
        outbox._check_identity(NOW)
    assert outbox.position().last_id == 2
    assert outbox.epoch == 1


def test_outcomes_are_written_though_a_page_of_activities_cannot_be_read(outbox):
    """Damage among activities that were claimed before it holds up nobody's outcome."""
    ids = [outbox.append("GROUP", f"USER-{n}" + "x" * 300, "TYPE", NOW) for n in range(100)]
    claimed = outbox.claim(2, 100)
    outbox._give_up_connection()
    with closing(sqlite3.connect(outbox.path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        place = f"%USER-50{'x' * 300}%".encode()
    content = outbox.path.read_bytes()
    at = content.index(place.strip(b"%")) // 1024 * 1024
    outbox.path.write_bytes(content[:at] + bytes(1024) + content[at + 1024 :])
    settle(outbox, claimed, Event.ACCEPT)
    assert set(outbox.settled(ids)) == set(ids)
    assert not outbox.lost


@pytest.mark.parametrize(
    ("event", "through", "tables"),
    [
        (Event.ACCEPT, 1, ["activity"]),
        (Event.DEFER, 1, ["activity"]),
        (Event.ACCEPT, 3, ["activity", "settlement"]),
    ],
    ids=["settled", "waiting", "watermark"],
)
def test_no_number_is_given_again_of_which_something_is_known(outbox, event, through, tables):
    """Who is recorded under it would be taken for who had it before, or be passed over."""
    outbox.append("GROUP", "LAST", "TYPE", NOW)
    (last,) = outbox.claim(2, 1)
    done = Settlement(activity=last, event=event, answered_at=NOW, reason="no", not_before=NOW + 9)
    outbox.settle([done], drained_through=through, refusals=(0, None))
    with closing(sqlite3.connect(outbox.path)) as connection, connection:
        for table, column in zip(tables, ("id", "activity_id"), strict=False):
            connection.execute(f"DELETE FROM perqueue_{table} WHERE {column} = 3")
    with pytest.raises(OutboxError, match="given twice"):
        outbox.append("GROUP", "ANOTHER", "TYPE", NOW)


def test_a_latest_row_that_is_gone_is_a_set_back_though_there_are_later_ones(outbox):
    """Nothing but pruning, which is counted, takes away the row that was the latest."""
    with closing(sqlite3.connect(outbox.path)) as connection, connection:
        connection.execute(
            "INSERT INTO perqueue_activity SELECT 3, billing_id, user_id, activity_type_id, recorded_at,"
            " checksum FROM perqueue_activity WHERE id = 2"
        )
        connection.execute("DELETE FROM perqueue_activity WHERE id = 2")
    outbox.position()
    assert outbox.epoch == 1


def test_a_damaged_row_is_no_set_back(outbox):
    """The latest row with a text that is not its own any more still has its own checksum."""
    with closing(sqlite3.connect(outbox.path)) as connection, connection:
        connection.execute("UPDATE perqueue_activity SET user_id = 'PENDINF' WHERE id = 2")
    outbox.position()
    assert outbox.epoch == 0


def test_no_more_are_counted_than_asked_for(outbox, monkeypatch):
    """A limit that is no multiple of a slice is a limit all the same."""
    monkeypatch.setattr(counts, "_SLICE", 4)
    for n in range(9):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    assert outbox.count_pending(100, 6) == 6


def test_the_trail_is_lost_through_the_latest_outcome_that_was_deleted(outbox):
    """And not through that of the last activity; nothing goes that is not older than asked for."""
    outbox.append("GROUP", "LAST", "TYPE", NOW)
    (last,) = outbox.claim(2, 1)
    early = Settlement(activity=last, event=Event.ACCEPT, answered_at=NOW - 5, transaction_id="T")
    outbox.settle([early], drained_through=1, refusals=(0, None))
    outbox.append("GROUP", "HIGHEST", "TYPE", NOW)
    outbox.prune(NOW - 5, 10, 10)
    assert set(fates(outbox)) == {"SETTLED", "PENDING", "LAST", "HIGHEST"}
    outbox.prune(NOW + 1, 10, 10)
    assert set(fates(outbox)) == {"PENDING", "HIGHEST"}
    with closing(sqlite3.connect(outbox.path)) as connection:
        assert connection.execute("SELECT trail_lost_through FROM perqueue_drain").fetchone() == (NOW,)


def test_a_file_of_which_too_much_cannot_be_read_is_not_written_off(outbox, monkeypatch):
    """However few at a time: beyond a number of unreadable rows nothing more is settled as damaged."""
    for n in range(9):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    monkeypatch.setattr(claims, "_MOST_UNREADABLE", 4)
    monkeypatch.setattr(outbox, "_read_one", lambda *_: None)
    monkeypatch.setattr(outbox, "_read", lambda _, keys, values: outbox._read_each(keys, values))
    with pytest.raises(OutboxError, match="more than 4 activities cannot be read"):
        outbox.claim(1, 2)
    assert outbox.position().damaged == 4
