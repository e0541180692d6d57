"""A backup is restored into the file while programs have it open: SQLite gives its numbers once more."""

import asyncio
import shutil
import sqlite3
import subprocess
import threading
from contextlib import closing
from datetime import timedelta

import pytest

from perqueue import ActivityRejected, OutboxError
from perqueue.sandbox import Hang, Refuse
from tests.helpers import Child, environment

DELIVER = """
    import logging

    logging.basicConfig()
    with PerQueue(embedded=True, max_in_flight=4) as queue:
        say("ready")
        hear()
"""
CARELESS = """
    from perqueue._outbox import queries, setback, settling

    setback.SetBackSession._notice = lambda *_: None
    settling.SettlingSession._is_there = staticmethod(lambda *_: True)
    for size, (accept, _) in settling.ACCEPT.items():
        accept = accept.replace(" CROSS JOIN perqueue_activity a WHERE a.id = answer.activity_id", " WHERE 1")
        accept = accept.replace(" AND a.checksum = answer.activity", "")
        settling.ACCEPT[size] = accept, queries.ACCEPT[size][1].partition(" AND EXISTS")[0]
"""
RECORD = """
    import logging

    logging.basicConfig()
    queue = PerQueue(embedded=True, drain=False)
    say("ready")
    while user := hear():
        say(queue.record("SHOP", user).id)
"""


def by_python(backup, path):
    with closing(sqlite3.connect(backup)) as source, closing(sqlite3.connect(path, timeout=20)) as target:
        source.backup(target)


def by_the_shell(backup, path):
    if shutil.which("sqlite3") is None:
        pytest.skip("needs the sqlite3 shell")
    commands = [".timeout 20000", f".restore {backup}"]
    subprocess.run(["sqlite3", path, *commands], check=True, capture_output=True, timeout=60)


@pytest.fixture
def backup(app, tmp_path):
    """Make a backup of the application's database, and return the function that restores it."""

    def make():
        path = tmp_path / "backup.db"
        by_python(app, path)
        return lambda how=by_python: how(path, app)

    return make


def attributed(app, per):
    """Return whose outcome is whose, by the file and by Per: pairs of users that must be equal."""
    truth = {activity.transaction_id: activity.user_id for activity in per.activities}
    query = (
        "SELECT a.user_id, s.transaction_id FROM perqueue_settlement s"
        " LEFT JOIN perqueue_activity a ON a.id = s.activity_id WHERE s.state = 1"
    )
    with closing(sqlite3.connect(app)) as connection:
        return [(user, truth[transaction]) for user, transaction in connection.execute(query)]


def restore_in_flight(script, how, app, per, embed, backup, until):
    """Restore while some are in flight and others are claimed, and record others under their numbers."""
    onlooker = embed(drain=False)
    onlooker.record("SHOP", "OLD")
    env = environment(app, per)
    with Child(script, env=env) as deliverer, Child(RECORD, env=env) as recorder:
        deliverer.expect("ready")
        recorder.expect("ready")
        until(lambda: not onlooker.stats().pending)
        restore = backup()
        per.set_fault(Hang(accept=True))
        for n in range(30):
            recorder.tell(f"BEFORE-{n}")
            recorder.expect("")
        per.wait_for_requests(3)
        restore(how)
        ids = []
        for n in range(40):
            recorder.tell(f"AFTER-{n}")
            ids.append(int(recorder.expect("")))
        assert ids == list(range(2, 42))
        per.clear_faults()
        per.release()
        deliverer.tell("end")
        deliverer.wait(60)
        recorder.tell("")
        recorder.wait()
        return deliverer.errors(), recorder.errors()


@pytest.mark.parametrize("how", [by_python, by_the_shell])
def test_no_outcome_is_taken_for_anothers_and_nothing_is_passed_over(
    how, app, per, embed, backup, billed, until
):
    """What is recorded after a restore is delivered, each under its own transaction ID; it is logged once."""
    errors = restore_in_flight(DELIVER, how, app, per, embed, backup, until)
    pairs = attributed(app, per)
    assert [user for user, accepted in pairs if user != accepted] == []
    assert {user for user, _ in pairs} == {"OLD", *(f"AFTER-{n}" for n in range(40))} <= billed()
    for each in errors:
        assert each.count("has gone back to an earlier state") == 1
    with closing(sqlite3.connect(app)) as connection:
        (waits,) = connection.execute("SELECT count(*) FROM perqueue_retry").fetchone()
        accepted = connection.execute("SELECT accepted, drained_through FROM perqueue_drain").fetchone()
    assert (waits, accepted) == (0, (41, 41))


def test_the_check_sees_outcomes_of_others(app, per, embed, backup, billed, until):
    """A drain that goes by numbers alone writes outcomes for what never went, and passes others over."""
    script = CARELESS + DELIVER.replace("hear()", "hear(); queue.close()")
    restore_in_flight(script, by_python, app, per, embed, backup, until)
    pairs = attributed(app, per)
    assert [user for user, accepted in pairs if user != accepted]
    assert not {f"AFTER-{n}" for n in range(40)} <= billed()


GONE_BACK = "gone back to an earlier state"


def test_what_was_pending_in_the_backup_is_delivered_again(embed, per, backup, until):
    """It is pending once more, though nobody records anything and claims were far beyond it."""
    per.set_fault(Hang(accept=True))
    queue = embed()
    queue.record("SHOP", "FIRST")
    per.wait_for_requests(1)
    restore = backup()
    per.clear_faults()
    per.release()
    for n in range(20):
        queue.record("SHOP", f"LATER-{n}")
    queue.flush(10)
    restore()
    until(lambda: [each.user_id for each in per.activities].count("FIRST") == 2)
    queue.flush(10)
    assert (queue.stats().delivered, queue.stats().pending) == (1, 0)


@pytest.mark.parametrize("drain", [True, False])
def test_who_waits_for_what_is_gone_is_told(embed, per, backup, until, drain):
    """A receipt and a flush raise soon, whether the number is given again or not; new ones work."""
    delivers = embed()
    delivers.record("SHOP", "OLD")
    delivers.flush(10)
    queue = delivers if drain else embed(drain=False)
    restore = backup()
    per.set_fault(Hang(accept=True))
    receipts = [queue.record("SHOP", f"BEFORE-{n}") for n in range(5)]
    until(lambda: delivers.stats().in_flight)
    told = []

    def tell(wait):
        with pytest.raises(OutboxError, match=GONE_BACK):
            wait()
        told.append(wait)

    waiting = [
        lambda: queue.flush(30),
        lambda: receipts[2].wait(30),
        lambda: asyncio.run(wait_for(receipts[3])),
    ]
    threads = [threading.Thread(target=tell, args=(wait,)) for wait in waiting]
    for thread in threads:
        thread.start()
    until(lambda: queue._observer.waiters.any() and len(queue._observer.waiters.ids()) == 2)
    restore()
    per.clear_faults()
    per.release()
    again = [queue.record("SHOP", f"AFTER-{n}") for n in range(3)]
    assert [receipt.id for receipt in again] == [receipt.id for receipt in receipts[:3]]
    for thread in threads:
        thread.join(10)
    assert len(told) == 3
    queue.flush(10)
    with pytest.raises(OutboxError, match=GONE_BACK):
        receipts[0].wait(10)
    sent = {each.user_id: each.transaction_id for each in per.activities}
    assert [receipt.wait(10) for receipt in again] == [sent[f"AFTER-{n}"] for n in range(3)]


async def wait_for(receipt):
    return await receipt


def test_a_window_that_is_gone_swallows_nothing(embed, backup, until, billed):
    """With coalesce, an activity that vanished stands for no other, though it is remembered."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    restore = backup()
    assert queue.record("SHOP", "CUSTOMER").id == queue.record("SHOP", "CUSTOMER").id == 1
    restore()
    until(lambda: queue.record("SHOP", "CUSTOMER") and queue.stats().pending == 1)
    embed().flush(10)
    assert billed() == {"CUSTOMER"}


def test_refusals_after_a_restore_are_raised(embed, per, backup):
    """flush() counts the refusals of the file as it is, not as it was."""
    queue = embed()
    restore = backup()
    for n in range(3):
        per.set_fault(Refuse("no"), times=1)
        queue.record("SHOP", f"BEFORE-{n}")
        with pytest.raises(ActivityRejected):
            queue.flush(10)
    restore()
    queue.flush(10)
    per.set_fault(Refuse("no"), times=1)
    queue.record("SHOP", "AFTER")
    with pytest.raises(ActivityRejected):
        queue.flush(10)


@pytest.mark.parametrize(
    "statement", ["VACUUM", "CREATE TABLE more (x)", "ALTER TABLE orders ADD COLUMN x", "ANALYZE"]
)
def test_what_the_application_does_with_its_schema_is_no_restore(embed, connect, statement, caplog, billed):
    """Delivery goes on without a word."""
    queue = embed()
    queue.record("SHOP", "FIRST")
    queue.flush(10)
    connect(timeout=20).execute(statement)
    queue.record("SHOP", "SECOND")
    queue.flush(10)
    assert billed() == {"FIRST", "SECOND"}
    assert GONE_BACK not in caplog.text


def test_the_trail_of_what_was_settled_since_is_called_incomplete(embed, backup, until, connect):
    """No period before the restore is called a match: outcomes of it are gone."""
    queue = embed()
    restore = backup()
    queue.record("SHOP", "CUSTOMER")
    queue.flush(10)
    restore()
    trail = "SELECT trail_lost_through, drainer_pid FROM perqueue_drain"
    until(lambda: all(connect(timeout=20).execute(trail).fetchone()))


def test_another_outbox_in_its_place_is_refused(embed, app, tmp_path, connect):
    """A backup of another outbox, restored into the open file, gets nothing and gives nothing."""
    other = tmp_path / "other.db"
    by_python(app, other)
    queue = embed()
    embed(other).record("SHOP", "OTHER")
    by_python(other, app)
    with pytest.raises(OutboxError, match="replaced by another one"):
        queue.flush(10)
