"""A backup is restored into the file while programs have it open: SQLite gives its numbers once more."""

import asyncio
import shutil
import sqlite3
import subprocess
import threading
from contextlib import closing
from datetime import timedelta

import pytest

from perqueue import OutboxError
from perqueue.sandbox import Hang
from tests.helpers import Child, environment, until

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
        accept = accept.replace(" CROSS JOIN perqueue_activity a WHERE a.id = answer.activity_id", " WHERE true")
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


def restore_in_flight(script, how, app, per, embed, backup):
    """Restore while some are in flight and others are claimed, and record others under their numbers."""
    onlooker = embed(drain=False)
    onlooker.record("SHOP", "OLD")
    env = environment(app, per)
    with Child(script, env=env) as deliverer, Child(RECORD, env=env) as recorder:
        deliverer.expect("ready")
        recorder.expect("ready")
        until(lambda: not onlooker.stats().pending, "OLD is delivered")
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
def test_no_outcome_is_taken_for_anothers_and_nothing_is_passed_over(how, app, per, embed, backup, billed):
    """What is recorded after a restore is delivered, each under its own transaction ID, and the log says it."""
    errors = restore_in_flight(DELIVER, how, app, per, embed, backup)
    pairs = attributed(app, per)
    assert [user for user, accepted in pairs if user != accepted] == []
    assert {user for user, _ in pairs} == {"OLD", *(f"AFTER-{n}" for n in range(40))} <= billed()
    for each in errors:
        assert each.count("has gone back to an earlier state") == 1
    with closing(sqlite3.connect(app)) as connection:
        (waits,) = connection.execute("SELECT count(*) FROM perqueue_retry").fetchone()
        accepted = connection.execute("SELECT accepted, drained_through FROM perqueue_drain").fetchone()
    assert (waits, accepted) == (0, (41, 41))


def test_the_check_sees_outcomes_of_others(app, per, embed, backup, billed, tmp_path):
    """A drain that goes by numbers alone writes outcomes for what never went, and passes others over."""
    script = CARELESS + DELIVER.replace("hear()", "hear(); queue.close()")
    restore_in_flight(script, by_python, app, per, embed, backup)
    pairs = attributed(app, per)
    assert [user for user, accepted in pairs if user != accepted]
    assert not {f"AFTER-{n}" for n in range(40)} <= billed()
