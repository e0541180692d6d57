"""Hosts whose clocks are an hour apart: the database's clock rules, a host's own only dates its records."""

import time
from contextlib import closing, contextmanager

import pytest

from perqueue._activity import Event, Settlement
from perqueue._address import DatabaseURL
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.protocol import Hold
from perqueue.sandbox import Status
from tests.helpers import PREAMBLE, Child, repeats, users

HOUR = 3_600_000
ORIGIN = "https://per.example"
SKEWED = (
    """
import sys, time
true_time = time.time
time.time = lambda: true_time() + float(sys.argv[1])
"""
    + PREAMBLE
    + """
queue = PerQueue(exit_timeout=0, retry=RetryPolicy(base=0.1, cap=0.2))
for number in range(50):
    queue.record("GROUP", f"{sys.argv[1]}_{number}")
say("recorded")
hear()
queue.flush(30)
queue.close()
"""
)


@contextmanager
def host(seconds):
    """Be on a host whose clock is so many seconds ahead."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SYSTEM_CLOCK, "wall", lambda: time.time() + seconds)
        yield


@pytest.fixture(params=[-3600, 3600], ids=["behind", "ahead"])
def skew(request):
    return request.param


@pytest.fixture
def drainers(outbox):
    """Two drainers of one outbox."""
    from perqueue._outbox.postgres.outbox import PostgresOutbox

    with (
        closing(PostgresOutbox(DatabaseURL(outbox), ORIGIN)) as one,
        closing(PostgresOutbox(DatabaseURL(outbox), ORIGIN)) as other,
    ):
        one.begin_term()
        other.begin_term()
        yield one, other


def settle(drainer, activity, event=Event.ACCEPT, wait_ms=None):
    at = SYSTEM_CLOCK.time_ms()
    settlement = Settlement(
        activity=activity,
        event=event,
        answered_at=at,
        duration_ms=5,
        transaction_id="T",
        reason="R",
        not_before=None if wait_ms is None else at + wait_ms,
    )
    drainer.settle([settlement], drained_through=0, refusals=(0, None))


def claim_one(drainer, recorded_at=None):
    drainer.append("GROUP", "USER", "TYPE", recorded_at or SYSTEM_CLOCK.time_ms())
    (activity,) = drainer.claim(0, 1)
    return activity


def test_hosts_an_hour_apart_deliver_each_activity_once(per, env):
    """Three hosts, an hour behind, right, and an hour ahead, record and drain together, through an outage:
    nothing is lost, nothing comes twice, and nobody waits for an hour.
    """
    per.set_fault(Status(503), times=5)
    hosts = [Child(SKEWED, seconds, env=env, isolated=True) for seconds in (-3600, 0, 3600)]
    try:
        for each in hosts:
            each.expect("recorded")
        for each in hosts:
            each.tell("flush")
        for each in hosts:
            each.succeed(40)
    finally:
        for each in hosts:
            each.__exit__(None, None, None)
    assert set(users(per)) == {f"{seconds}_{n}" for seconds in (-3600, 0, 3600) for n in range(50)}
    assert repeats(per) == 0


def test_a_host_with_a_wrong_clock_keeps_its_lease(drainers, skew):
    """A drainer's lease is as long as everybody's, whatever its own clock says."""
    one, other = drainers
    with host(skew):
        one.keep_lease()
        claim_one(one)
    other._sweep_at = float("-inf")
    assert other.claim(0, 10) == []
    left = "SELECT extract(epoch FROM alive_until - clock_timestamp())::float8 FROM perqueue_drainer"
    for (seconds,) in other._rows(left):
        assert 5 < seconds <= 10


def test_a_retry_waits_as_long_as_it_was_told_to(drainers, skew):
    """What a host with a wrong clock puts off is due when it said, on every host."""
    one, other = drainers
    with host(skew):
        settle(one, claim_one(one), Event.DEFER, wait_ms=60_000)
    with host(-skew):
        assert 58_000 < other.next_due() - SYSTEM_CLOCK.time_ms() <= 60_000
    now = SYSTEM_CLOCK.time_ms()
    assert other.claim_due(now, now + HOUR, 10, {}) == []
    other._rows("UPDATE perqueue_pending SET not_before = clock_timestamp() RETURNING id")
    with host(-skew):
        now = SYSTEM_CLOCK.time_ms()
        assert len(other.claim_due(now, now + HOUR, 10, {})) == 1


def test_a_retry_after_ends_for_all_at_once(drainers, skew):
    """A wait that Per asked of a host with a wrong clock is as long for all others."""
    one, other = drainers
    with host(skew):
        one.set_hold(Hold("retry_after", "R", SYSTEM_CLOCK.time_ms() + 60_000, 60_000))
        assert 58_000 < one.news().hold.until - SYSTEM_CLOCK.time_ms() <= 60_000
    assert 58_000 < other.news().hold.until - SYSTEM_CLOCK.time_ms() <= 60_000


def test_outcomes_are_dated_by_the_database(drainers, skew):
    """When Per answered is told by one clock for all hosts; when something was recorded, by its host's."""
    one, _ = drainers
    with host(skew):
        activity = claim_one(one)
        settle(one, activity, Event.DEFER)
        settle(one, activity)
    ((recorded_at, settled_at),) = one._rows("SELECT recorded_at, settled_at FROM perqueue_settled")
    ((attempted_at,),) = one._rows("SELECT attempted_at FROM perqueue_attempt")
    now = SYSTEM_CLOCK.time_ms()
    assert abs(recorded_at - now - skew * 1000) < 10_000
    assert abs(settled_at - now) < 10_000
    assert 0 <= settled_at - attempted_at < 10_000


def test_nothing_is_pruned_too_early(drainers, skew):
    """What one host has settled another one prunes neither an hour too early nor too late."""
    one, other = drainers
    with host(skew):
        settle(one, claim_one(one))
    with host(-skew):
        other.prune(SYSTEM_CLOCK.time_ms() - HOUR, 1000, 10)
        assert other.position().accepted == 1
        assert other._rows("SELECT count(*) FROM perqueue_settled") == [(1,)]
        other._rows(f"UPDATE perqueue_settled SET settled_at = settled_at - {HOUR} RETURNING id")
        other.prune(SYSTEM_CLOCK.time_ms() - HOUR, 1000, 10)
    assert other._rows("SELECT count(*) FROM perqueue_settled") == [(0,)]


def test_a_window_is_remembered_until_it_is_over_everywhere(drainers, skew):
    """A host that is ahead forgets no window that is not over yet on one that is right, and none late."""
    one, other = drainers
    now = SYSTEM_CLOCK.time_ms()
    first = one.append_once(("GROUP", "USER", "TYPE"), (now - HOUR, now + 1000), now)
    with host(skew):
        other.expire(SYSTEM_CLOCK.time_ms(), 100)
    assert one.append_once(("GROUP", "USER", "TYPE"), (now - HOUR, now + 1000), now) == first
    with host(skew):
        other.expire(SYSTEM_CLOCK.time_ms() + 2000, 100)
    assert one.append_once(("GROUP", "USER", "TYPE"), (now - HOUR, now + 1000), now) != first


def test_a_database_whose_clock_is_set_back_rescues_all_the_same(drainers):
    """Leases and probes that end too late cannot be right, as after a fail-over to a server that is behind:
    they stand in nobody's way.
    """
    dead, heir = drainers
    activity = claim_one(dead)
    dead.set_hold(Hold("backing_off", "R", 0, 0))
    assert dead.take_probe()
    heir._rows("UPDATE perqueue_drainer SET alive_until = alive_until + interval '1 hour' RETURNING owner")
    heir._rows("UPDATE perqueue_outbox SET probe_until = probe_until + interval '1 hour' RETURNING id")
    assert heir.drainers() == []
    heir._extend(heir._owner)
    heir._sweep_at = float("-inf")
    assert [each.id for each in heir.claim(0, 10)] == [activity.id]
    assert heir.take_probe()
    settle(dead, activity)
    assert dead.lost == [activity.id]
