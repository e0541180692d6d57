"""Fail-over: the primary is killed, its standby promoted, and a URL with both hosts finds it."""

import pytest

from perqueue import OutboxError, PerQueue
from perqueue.sandbox import Latency
from tests import postgresql
from tests.helpers import repeats, until, users
from tests.postgres.conftest import recorded
from tests.postgres.wire import Wire

DRAIN = """
queue = PerQueue(max_in_flight=8, exit_timeout=0)
queue.record("GROUP", "FIRST").wait(20)
say("ready")
hear()
say(queue.flush(60))
"""


@pytest.fixture
def pair():
    """A primary, its standby, and the wire between them; a commit waits for both."""
    postgresql.need()
    primary = postgresql.Server(["wal_keep_size=64MB"])
    wire = Wire(primary.port)
    standby = None
    try:
        standby = postgresql.Server(primary=primary, at=wire.port)
        wait_for_both(primary, "standby")
        yield primary, standby, wire
    finally:
        primary.close()
        wire.close()
        if standby is not None:
            standby.close()


def wait_for_both(primary, names):
    """Set whose copy a commit waits for, and wait until that is so."""
    primary.sql(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'", "SELECT pg_reload_conf()")
    state = "sync" if names else "async"
    until(
        lambda: primary.sql("SELECT sync_state FROM pg_stat_replication") == [(state,)],
        f"{state} replication",
    )


def both(primary, standby):
    """Return a URL with both servers' addresses."""
    return primary.url.replace("/postgres", f",127.0.0.1:{standby.port}/postgres")


def test_a_promoted_standby_has_all_that_was_acknowledged(per, pair, recorders, child):
    """When the primary is killed and its standby promoted, processes that record and drain go on there by
    themselves, and nothing is lost: a commit had waited for both. A careless program's loss is seen.
    """
    primary, standby, _ = pair
    url = both(primary, standby)
    per.set_fault(Latency(0.02))
    drainer = child(DRAIN, PERQUEUE_OUTBOX=url)
    drainer.expect("ready")
    recorders.start(url)
    per.wait_for(50)
    primary.murder()
    recorders.noticed()
    standby.sql("SELECT pg_promote()")
    per.wait_for(per.accepted + 50, timeout=30)
    careful, careless = recorders.end()
    per.clear_faults()
    drainer.tell("go on")
    assert drainer.expect("", 60) == "None"
    assert careful - set(users(per)) == set()
    assert careless - set(users(per)) != set()
    assert repeats(per) <= 8 + 100  # what was in flight, or answered and not written down yet


def test_what_a_standby_never_got_was_not_acknowledged(per, pair, options):
    """While the standby is cut off record() fails as long as commits wait for it; once they do not, what it
    acknowledges is lost with the primary, and that is seen.
    """
    primary, standby, wire = pair
    queue = PerQueue(both(primary, standby), **options, drain=False)
    try:
        queue.record("GROUP", "BEFORE")
        wire.cut()
        with pytest.raises(OutboxError, match="no answer within 1 s"):
            queue.record("GROUP", "NOT_ACKNOWLEDGED")
        wait_for_both(primary, "")
        queue.record("GROUP", "ACKNOWLEDGED")
        primary.murder()
        wire.close()
        standby.sql("SELECT pg_promote()")
        until(lambda: recorded(queue), "it records again")
    finally:
        queue.close()
    with PerQueue(both(primary, standby), **options):
        pass
    assert set(users(per)) == {"BEFORE", "AFTER"}
