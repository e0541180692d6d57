"""Two versions of the library on one database, of which the newer one brings a step of the schema."""

import pytest

from perqueue import OutboxMismatch
from tests.helpers import repeats, until, users

NEWER = """
from perqueue._outbox.postgres import schema
schema._STEPS = (*schema._STEPS, (
    "ALTER TABLE perqueue_pending ADD COLUMN note text",
    "ALTER TABLE perqueue_settled ADD COLUMN note text",
))
schema.SCHEMA_VERSION = len(schema._STEPS)
"""
DRAIN = """
queue = PerQueue()
queue.record("GROUP", "NEWER").wait(20)
say("delivered")
hear()
queue.close()
"""
START = """
say("starts")
try:
    PerQueue(drain=False)
except OutboxError as error:
    say(f"told {error}")
"""


def test_an_older_version_that_runs_goes_on(per, make_queue, recorders, child, sql):
    """While programs of an older version record and drain, a newer one brings the tables up to date, and
    both go on: nothing is lost, and nothing comes twice. Only what starts anew must be the newer one.
    """
    drain = make_queue()
    drain._follower().start()
    recorders.start(drain._settings.outbox.dsn)
    per.wait_for(50)
    newer = child(NEWER + DRAIN)
    newer.expect("delivered", 30)
    per.wait_for(per.accepted + 50)
    careful, _ = recorders.end()
    drain.flush(30)
    assert sql("SELECT schema_version FROM perqueue_outbox") == [(2,)]
    assert careful - set(users(per)) == set()
    assert (repeats(per), drain.stats().rejected) == (0, 0)
    with pytest.raises(OutboxMismatch, match="newer perqueue"):
        make_queue()
    newer.tell("end")
    newer.succeed()


def test_a_step_of_the_schema_waits_for_nobody_long(make_queue, child, outbox):
    """A newer version that cannot have the tables now holds up nobody: it fails to start, says why, and
    record() goes on meanwhile.
    """
    import psycopg

    queue = make_queue(drain=False)
    queue.record("GROUP", "BEFORE")
    with psycopg.connect(outbox) as business:
        business.execute("SELECT * FROM perqueue_pending")  # and so it must not be altered
        newer = child(NEWER + START)
        newer.expect("starts")
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'perqueue_pending'::regclass"
        with psycopg.connect(outbox, autocommit=True) as operator:
            until(lambda: operator.execute(waits).fetchone() != (0,), "it waits for the lock")
        queue.record("GROUP", "MEANWHILE")
        assert "holds a lock" in newer.expect("told", 20)
    assert queue.stats().pending == 2
