"""The wall clock may jump by hours or years, in either direction: nothing stalls (invariant 11)."""

import itertools
import time

import pytest

from perqueue import FlushTimeout, RetryPolicy
from perqueue._clock import Clock
from perqueue.sandbox import RateLimited, Status
from tests.helpers import repeats, until

HOUR = 3600
JUMPS = {
    "an hour ahead": HOUR,
    "an hour back": -HOUR,
    "ten years ahead": 87_600 * HOUR,
    "ten years back": -87_600 * HOUR,
}
each_jump = pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)
two_jumps = pytest.mark.parametrize("jump", [87_600 * HOUR, -HOUR], ids=["ten years ahead", "an hour back"])

QUICK = RetryPolicy(base=0.05, cap=0.2, activity_cap=0.5)


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that goes ahead by itself, and jumps when its ``offset`` is set; every queue uses it."""

    class Offset:
        seconds = 0.0

    jumping = Clock(wall=lambda: time.time() + Offset.seconds)
    monkeypatch.setattr("perqueue._recorder.SYSTEM_CLOCK", jumping)
    return Offset


@each_jump
def test_backoff_ends(per, make_queue, clock, jump):
    """A jump during an outage neither prolongs the backoff nor keeps what is recorded afterwards."""
    queue = make_queue(retry=QUICK)
    per.set_fault(Status(503))
    queue.record("GROUP", "USER_1")
    per.wait_for_requests(3)
    clock.seconds = jump
    queue.record("GROUP", "USER_2")
    per.clear_faults()
    per.wait_for(2, timeout=3)
    until(lambda: queue.stats().pending == 0, "all is settled", 3)


@two_jumps
def test_retry_after_ends(per, make_queue, clock, jump):
    """A `Retry-After` of a second is obeyed for a second, whatever the wall clock says meanwhile."""
    per.set_fault(RateLimited(1), times=1)
    queue = make_queue()
    queue.record("GROUP", "USER")
    per.wait_for_requests(1)
    asked = time.monotonic()
    clock.seconds = jump
    per.wait_for(1, timeout=4)
    assert 0.8 < time.monotonic() - asked < 4


@two_jumps
def test_stored_hold_ends_after_a_restart(per, make_queue, clock, jump):
    """A `Retry-After` that a restart finds in the outbox holds no longer than Per had asked for at most."""
    retry = RetryPolicy(retry_after_cap=1.5)
    per.set_fault(RateLimited(60), times=1)
    queue = make_queue(retry=retry)
    queue.record("GROUP", "USER")
    until(lambda: queue.stats().state == "backing_off", "the hold is stored")
    queue.close()
    clock.seconds = jump
    make_queue(retry=retry)
    per.wait_for(1, timeout=4)


@each_jump
def test_own_wait_of_one_activity_ends(per, make_queue, clock, jump):
    """An activity that failed on its own account is tried again in its time, though its wait is stored."""
    queue = make_queue(retry=QUICK)
    per.set_fault(Status(500), when=lambda activity: activity.user_id == "POISON")
    queue.record("GROUP", "USER_1").wait(5)
    queue.record("GROUP", "POISON")
    queue.record("GROUP", "USER_2").wait(5)
    until(lambda: per.requests >= 6, "it is retried on its own account")
    clock.seconds = jump
    per.clear_faults()
    per.wait_for(3, timeout=3)
    until(lambda: queue.stats().pending == 0, "all is settled", 3)
    assert repeats(per) == 0


def test_recording_goes_on_through_any_jumps(per, make_queue, clock):
    """Every record() succeeds and everything is delivered while the clock jumps all the time."""
    queue = make_queue(max_in_flight=8)
    for n, jump in zip(range(100), itertools.cycle(JUMPS.values()), strict=False):
        clock.seconds = jump
        queue.record("GROUP", f"USER_{n}")
    queue.flush(10)
    assert per.accepted == 100
    assert queue.stats().pending == 0


@each_jump
def test_flush_ends_in_time(per, make_queue, clock, jump):
    """The deadline of flush() is kept although the clock jumps during the wait."""
    per.go_down()
    queue = make_queue(retry=QUICK)
    queue.record("GROUP", "USER")
    until(lambda: queue.stats().state == "backing_off", "the outage is noticed")
    clock.seconds = jump
    began = time.monotonic()
    with pytest.raises(FlushTimeout):
        queue.flush(0.4)
    assert 0.3 < time.monotonic() - began < 3
    age = queue.stats().oldest_pending_age
    assert age >= 0
    per.come_back()
    queue.flush(5)
