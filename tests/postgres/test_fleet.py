"""Several drainers, one outbox: each activity has one of them, and nobody's death loses it."""

import time

import pytest

from perqueue.sandbox import Hang, Latency
from tests.helpers import repeats, until
from tests.postgres.quick import LEASE

DRAIN = """
queue = PerQueue(exit_timeout=0)
say("ready")
hear()
queue.close()
"""

CARELESS = """
from perqueue._outbox.postgres.claims import ClaimedSession
claim = ClaimedSession._claim
def at_most_once(self, *given):
    claimed = claim(self, *given)
    self._rows("DELETE FROM perqueue_pending WHERE owner = %s", (self._owner,))
    return claimed
ClaimedSession._claim = at_most_once
"""
"""What makes a drainer one that takes what it has been given for delivered."""


def record(queue, count, prefix="USER"):
    for number in range(count):
        queue.record("GROUP", f"{prefix}_{number}")


def test_several_drainers_deliver_each_activity_once(per, make_queue, child):
    """Three processes drain one backlog, each a part of it, and none delivers what another has."""
    per.set_fault(Latency(0.02))
    queue = make_queue(drain=False)
    record(queue, 600)
    children = [child(DRAIN) for _ in range(3)]
    for process in children:
        process.expect("ready")
    queue.flush(30)
    assert per.accepted == 600
    assert repeats(per) == 0
    assert queue.stats().delivered == 600


@pytest.mark.usefixtures("quick_leases")
@pytest.mark.parametrize("careless", [False, True])
def test_what_a_killed_drainer_had_claimed_is_rescued(per, make_queue, child, careless):
    """After a kill -9 another delivers it all within two leases; at most what was in flight is repeated.
    What a careless one had deleted before it was answered is lost, which is seen.
    """
    queue = make_queue(drain=False)
    record(queue, 200)
    per.set_fault(Hang(), times=1)
    process = child(CARELESS * careless + DRAIN)
    process.expect("ready")
    until(lambda: per.requests >= 1, "it delivers")
    process.kill()
    killed = time.monotonic()
    per.release()
    rescuer = make_queue()
    rescuer.flush(20)
    took = time.monotonic() - killed
    print(f"rescued after {took:.1f} s")
    assert took < 2 * LEASE + 2  # a busy machine is late
    assert (per.unique("GROUP") == 200) is not careless
    assert repeats(per) <= 32


def test_whoever_waits_hears_of_what_others_deliver(per, make_queue, monkeypatch):
    """A receipt of a process that drains is told soon when another one has delivered the activity."""
    waiting, other = make_queue(), make_queue()
    monkeypatch.setattr(waiting._outbox, "claim", lambda after, limit: [])
    monkeypatch.setattr("perqueue._receipt._FIRST_LOOK", 30.0)
    other._follower().start()
    for number in range(3):
        assert waiting.record("GROUP", f"USER_{number}").wait(10)
    assert per.accepted == 3
