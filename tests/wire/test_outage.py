"""Per is away, or asks to wait: few requests, growing waits, and everything arrives afterwards."""

import logging
import time

import pytest

from perqueue import DrainState, FlushTimeout, RetryPolicy
from perqueue.sandbox import Hang, RateLimit, RateLimited, Sandbox, Status

QUICK = RetryPolicy(base=0.02, cap=0.1)


def record(queue, count, prefix="USER"):
    for number in range(count):
        queue.record("GROUP_A", f"{prefix}_{number}")


def test_an_outage_costs_few_requests_and_loses_nothing(per, make_queue, caplog):
    """3 s of 503 with 1,000 pending: 30 requests at most, and all arrive afterwards (invariants 3, 6)."""
    per.set_fault(Status(503))
    queue = make_queue()
    with caplog.at_level(logging.INFO, "perqueue"):
        record(queue, 1_000)
        with pytest.raises(FlushTimeout) as caught:
            queue.flush(timeout=3)
        assert caught.value.pending == 1_000
        assert 2 <= per.requests <= 30
        assert per.max_concurrent == 1
        assert queue.stats().state is DrainState.BACKING_OFF
        per.clear_faults()
        queue.flush(timeout=20)
    assert per.unique("GROUP_A") == 1_000
    assert [entry.levelno for entry in caplog.records] == [logging.WARNING, logging.INFO]


def test_an_outage_at_full_speed_ends_in_one_probe_at_a_time(make_queue, until):
    """When 32 requests fail together, one probe remains, and after recovery all arrive (invariant 6)."""
    with Sandbox(latency=0.01) as per:
        queue = make_queue(base_url=per.url, retry=QUICK)
        record(queue, 400, "EARLY")
        per.wait_for(200)
        assert per.max_concurrent > 4
        per.set_fault(Status(503))
        until(lambda: queue.stats().state is DrainState.BACKING_OFF and queue.stats().in_flight <= 1)
        per._ledger.forget()
        per.wait_for_requests(8)
        assert per.max_concurrent == 1
        before = per.accepted
        per.clear_faults()
        queue.flush(timeout=10)
        assert queue.stats().delivered == 400
        assert per.accepted > before


def test_a_server_that_is_down_and_comes_back(per, make_queue, until):
    """Refused connections keep everything pending; the server's return delivers it (invariant 3)."""
    queue = make_queue()
    queue.record("GROUP_A", "FIRST").wait(5)
    per.go_down()
    record(queue, 100)
    until(lambda: "ConnectError" in (queue.stats().reason or ""))
    with pytest.raises(FlushTimeout, match="ConnectError"):
        queue.flush(timeout=0.1)
    per.come_back()
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 101


def test_delivery_goes_on_by_itself_after_an_outage(per, make_queue):
    """Without any flush, what an outage left behind is delivered after it."""
    per.set_fault(Status(502), times=5)
    queue = make_queue(retry=QUICK)
    record(queue, 50)
    per.wait_for(50)
    assert per.unique("GROUP_A") == 50


def test_recording_goes_on_during_an_outage(per, make_queue):
    """What is recorded while Per is away is kept like the rest (invariant 1)."""
    per.go_down()
    queue = make_queue(retry=QUICK)
    record(queue, 500)
    assert queue.stats().pending == 500
    assert queue.stats().oldest_pending_age >= 0
    per.come_back()
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 500


def test_the_count_of_arrivals_sees_a_loss(per, make_queue, arrived):
    """A control: an activity that is answered with "accepted" by somebody else is missing at Per."""
    per.set_fault(
        Status(200, '{"ok": true, "result": {"transactionId": "lie"}}', "application/json"),
        when=lambda activity: activity.user_id == "USER_7",
    )
    queue = make_queue()
    record(queue, 20)
    queue.flush(timeout=10)
    assert queue.stats().delivered == 20
    assert {("GROUP_A", f"USER_{number}") for number in range(20)} - arrived() == {("GROUP_A", "USER_7")}


# --- Retry-After ---


@pytest.mark.parametrize("fault", [RateLimited(60), Status(503, retry_after=60)], ids=["429", "503"])
def test_retry_after_holds_over_a_restart_and_against_flush(per, make_queue, until, fault):
    """Neither a flush nor a restart sends anything before the time that Per asked for (invariant 6)."""
    per.set_fault(fault, times=1)
    queue = make_queue()
    record(queue, 10)
    until(lambda: queue.stats().state is DrainState.BACKING_OFF)
    with pytest.raises(FlushTimeout, match="retry after"):
        queue.flush(timeout=0.3)
    stats = queue.stats()
    assert (stats.state, per.requests) == (DrainState.BACKING_OFF, 1)
    assert 59 < (stats.resumes_at - per.request_log[0].at).total_seconds() < 61
    queue.close()
    again = make_queue()
    assert again.stats().state is DrainState.BACKING_OFF
    with pytest.raises(FlushTimeout, match="retry after"):
        again.flush(timeout=0.3)
    assert per.requests == 1


def test_what_a_retry_after_held_is_delivered_at_its_end(per, make_queue):
    """Not before, not long after, and without being asked (invariant 6)."""
    per.set_fault(RateLimited(0.5), times=1)
    queue = make_queue()
    record(queue, 1)
    per.wait_for(1)
    first, second = per.request_log
    assert 0.45 <= (second.at - first.at).total_seconds() < 5


def test_retry_after_as_a_date_is_obeyed(per, make_queue, until):
    """A date means a wait as well; it counts in whole seconds (invariant 6)."""
    per.set_fault(RateLimited(60, as_date=True), times=1)
    queue = make_queue()
    record(queue, 1)
    until(lambda: queue.stats().state is DrainState.BACKING_OFF)
    with pytest.raises(FlushTimeout, match="retry after"):
        queue.flush(timeout=0.3)
    wait = (queue.stats().resumes_at - per.request_log[0].at).total_seconds()
    assert 58 < wait < 61


@pytest.mark.parametrize("asked", [3600, "9" * 30])
def test_a_retry_after_beyond_the_cap_is_cut(per, make_queue, asked):
    """However long Per asks for, the cap is the longest wait (invariant 6)."""
    per.set_fault(RateLimited(asked), times=1)
    queue = make_queue(retry=RetryPolicy(retry_after_cap=0.3))
    record(queue, 1)
    began = time.monotonic()
    queue.flush(timeout=5)
    assert 0.25 < time.monotonic() - began < 4
    assert per.requests == 2


@pytest.mark.parametrize("nonsense", ["soon", "-5", "0", "Thu, 99 Xyz 2024"])
def test_nonsense_in_retry_after_is_a_plain_429(per, make_queue, nonsense):
    """A `Retry-After` that cannot be read does not stop delivery for long."""
    per.set_fault(RateLimited(nonsense), times=1)
    queue = make_queue(retry=QUICK)
    record(queue, 1)
    queue.flush(timeout=5)
    assert per.accepted == 1


def test_the_end_of_a_retry_after_of_another_process_is_not_cut(per, make_queue, until):
    """Two queues on one outbox: the wait that Per told the one binds the other (invariants 5, 6)."""
    per.set_fault(RateLimited(30), times=1)
    first = make_queue()
    record(first, 1)
    until(lambda: first.stats().state is DrainState.BACKING_OFF)
    second = make_queue()
    with pytest.raises(FlushTimeout, match="retry after"):
        second.flush(timeout=0.3)
    first.close()
    with pytest.raises(FlushTimeout, match="retry after"):
        second.flush(timeout=1.2)
    assert per.requests == 1


def test_a_real_limiter_slows_delivery_down_and_loses_nothing(per, make_queue):
    """With a limit of 60 requests in a second all arrive, without a storm of refused ones."""
    per.set_fault(RateLimit(60, burst=40, retry_after=True))
    queue = make_queue()
    record(queue, 100)
    queue.flush(timeout=15)
    assert per.unique("GROUP_A") == 100
    assert per.requests < 200


def test_one_hanging_request_holds_up_no_others(per, make_queue, until):
    """An activity whose request hangs is one lane's trouble: the others go on (invariant 8)."""
    per.set_fault(Hang(), when=lambda activity: activity.user_id == "SLOW")
    queue = make_queue(request_timeout=60, exit_timeout=0)
    record(queue, 20)
    per.wait_for(20)
    queue.record("GROUP_A", "SLOW")
    record(queue, 100, "LATER")
    per.wait_for(120)
    until(lambda: queue.stats().pending == 1)
