"""What `flush()` and `aflush()` cover, share and raise."""

import asyncio
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from perqueue import (
    ActivityRejected,
    AuthenticationError,
    FlushTimeout,
    OutboxError,
    QueueClosed,
    RetryPolicy,
)
from perqueue.sandbox import Hang, Refuse, Status
from tests.helpers import quickest


def record(queue, count, prefix="USER"):
    for number in range(count):
        queue.record("GROUP_A", f"{prefix}_{number}")


def test_after_flush_per_has_it_all(per, make_queue):
    """When flush returns, everything recorded before it is at Per (invariant 4)."""
    queue = make_queue()
    for number in range(20):
        record(queue, number, f"ROUND_{number}")
        queue.flush(10)
        assert per.unique("GROUP_A") == sum(range(number + 1))
        assert queue.stats().pending == 0


def test_after_aflush_per_has_it_all(per, make_queue):
    """`aflush()` is the same promise, and the event loop goes on meanwhile (invariant 4)."""
    per.set_fault(Hang(accept=True), times=1)
    queue = make_queue()

    async def turn():
        await asyncio.to_thread(per.wait_for_requests, 1)
        per.release()

    async def main():
        record(queue, 50)
        await asyncio.gather(queue.aflush(10), turn())

    asyncio.run(main())
    assert per.unique("GROUP_A") == 50


def test_an_empty_queue_is_flushed_at_once(per, make_queue):
    """With nothing pending there is nothing to wait for, and nothing to ask Per."""
    queue = make_queue()
    assert quickest(lambda: queue.flush(0), 0.25) < 0.25
    assert quickest(lambda: asyncio.run(queue.aflush(0)), 0.25) < 0.25
    assert per.requests == 0


def test_flush_covers_what_is_pending_at_its_call(per, make_queue, until):
    """What is recorded later holds up no flush that began before (invariant 4)."""
    per.set_fault(Hang(accept=True), when=lambda activity: activity.user_id == "EARLY")
    per.set_fault(Hang(), when=lambda activity: activity.user_id == "LATE")
    queue = make_queue(exit_timeout=0)
    queue.record("GROUP_A", "EARLY")
    per.wait_for_requests(1)
    with ThreadPoolExecutor(1) as pool:
        flush = pool.submit(queue.flush, 10)
        until(queue._observer.waiters.any)
        queue.record("GROUP_A", "LATE")
        per.release()
        flush.result(10)
    assert {activity.user_id for activity in per.activities} == {"EARLY"}
    assert queue.stats().pending == 1


def test_flush_delivers_what_an_earlier_program_left(per, make_queue):
    """A flush covers the whole outbox, whoever recorded it."""
    first = make_queue(drain=False)
    record(first, 20)
    first.close()
    second = make_queue()
    second.flush(10)
    assert per.unique("GROUP_A") == 20


def test_zero_seconds_is_a_look_without_waiting(per, make_queue):
    """`flush(timeout=0)` raises at once if anything is pending."""
    per.set_fault(Hang())
    queue = make_queue(exit_timeout=0)
    record(queue, 3)

    def look():
        with pytest.raises(FlushTimeout) as caught:
            queue.flush(timeout=0)
        assert caught.value.pending == 3

    assert quickest(look, 0.3) < 0.3


def test_the_queues_own_timeout_is_the_default(per, make_queue):
    """`flush_timeout` counts for `flush()`, `aflush()` and `with`."""
    per.set_fault(Status(500))
    queue = make_queue(flush_timeout=0.2)
    record(queue, 1)
    began = time.monotonic()
    with pytest.raises(FlushTimeout, match=r"after 0\.2 s"):
        queue.flush()
    with pytest.raises(FlushTimeout, match=r"after 0\.2 s"):
        asyncio.run(queue.aflush())
    with pytest.raises(FlushTimeout, match=r"after 0\.2 s"), queue:
        pass
    assert time.monotonic() - began < 2


def test_none_waits_without_limit(per, make_queue):
    """`flush(timeout=None)` waits for as long as it takes, also where the queue has a limit."""
    per.set_fault(Status(500), times=8)
    queue = make_queue(flush_timeout=0.01, retry=RetryPolicy(base=0.05, cap=0.1))
    record(queue, 5)
    queue.flush(timeout=None)
    assert per.unique("GROUP_A") == 5


def test_concurrent_flushes_all_return(per, make_queue):
    """Threads and tasks that flush at once all get their promise, with no more requests than activities."""
    queue = make_queue()

    def one(number):
        record(queue, 20, f"THREAD_{number}")
        queue.flush(10)
        return per.unique("GROUP_A")

    with ThreadPoolExecutor(10) as pool:
        seen = list(pool.map(one, range(10)))
    assert max(seen) == per.accepted == per.requests == 200

    async def main():
        record(queue, 20, "TASK")
        await asyncio.gather(*(queue.aflush(10) for _ in range(20)))

    asyncio.run(main())
    assert per.accepted == per.requests == 220


def test_concurrent_aflushes_share_a_probe(per, make_queue):
    """Ten tasks that flush at once against a bad token cost three requests at most (invariant 6)."""
    queue = make_queue(activity_token="wrong")
    record(queue, 10)
    with pytest.raises(AuthenticationError):
        queue.flush(5)
    before = per.requests

    async def main():
        return await asyncio.gather(*(queue.aflush(5) for _ in range(10)), return_exceptions=True)

    results = asyncio.run(main())
    assert [type(result) for result in results] == [AuthenticationError] * 10
    assert 1 <= per.requests - before <= 3


def test_flushing_in_an_outage_is_no_storm(per, make_queue):
    """A program that flushes in a loop during an outage sends about ten probes a second at most
    (invariant 6).
    """
    per.set_fault(Status(503))
    queue = make_queue(retry=RetryPolicy(base=10_000, cap=10_000))
    record(queue, 10)
    began = time.monotonic()
    while time.monotonic() - began < 1:
        with pytest.raises(FlushTimeout):
            queue.flush(timeout=0.01)
    assert per.requests <= 15
    per.clear_faults()
    queue.flush(5)
    assert per.unique("GROUP_A") == 10


def test_closing_ends_a_flush(per, make_queue, until):
    """A flush under way in another thread, or in a loop, is told that the queue was closed."""
    per.set_fault(Hang())
    queue = make_queue(exit_timeout=0.1)
    record(queue, 1)
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(queue.flush, 30), pool.submit(lambda: asyncio.run(queue.aflush(30)))]
        until(lambda: len(queue._observer.waiters._listeners.get(None, ())) == 2)
        queue.close()
        for future in futures:
            with pytest.raises(QueueClosed):
                future.result(5)


def test_cancelling_aflush_leaves_nothing_behind(per, make_queue):
    """An `aflush()` that is cancelled stops listening; delivery goes on."""
    per.set_fault(Hang(accept=True))
    queue = make_queue()

    async def main():
        record(queue, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await queue.aflush(10)

    asyncio.run(main())
    assert not queue._observer.waiters.any()
    per.wait_for_requests(1)
    per.release()
    queue.flush(5)
    assert per.accepted == 1


def test_recording_while_flushing_loses_nothing(per, make_queue, arrived):
    """Threads that record and flush at the same time: what any flush covered is at Per (invariants 1, 4)."""
    queue = make_queue()
    stop = threading.Event()

    def work(number):
        recorded = set()
        while not stop.is_set() and len(recorded) < 150:
            for _ in range(10):
                user = f"{number}_{len(recorded)}"
                queue.record("GROUP_A", user)
                recorded.add(("GROUP_A", user))
            queue.flush(10)
            missing = recorded - arrived()
            assert not missing
        return recorded

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, number) for number in range(4)]
        try:
            done = [future.result(20) for future in futures]
        finally:
            stop.set()
    assert set().union(*done) == arrived()
    assert per.accepted == sum(map(len, done))


def test_every_concurrent_flush_hears_of_a_refusal(per, make_queue, until):
    """What Per refuses while several flush is raised by each of them, and by none that comes later."""
    per.set_fault(Hang(), when=lambda activity: activity.user_id == "BAD")
    queue = make_queue(exit_timeout=0)
    queue.record("GROUP_A", "BAD")
    per.wait_for_requests(1)
    started = threading.Barrier(5, timeout=10)

    def flush():
        started.wait()
        with pytest.raises(ActivityRejected):
            queue.flush(20)

    with ThreadPoolExecutor(4) as pool:
        flushes = [pool.submit(flush) for _ in range(4)]
        started.wait()
        until(lambda: len(queue._observer.waiters._get(None)) == 4)
        per.clear_faults()
        per.set_fault(Refuse("unknown_user"), when=lambda activity: activity.user_id == "BAD")
        per.release()
        for each in flushes:
            each.result(20)
    queue.record("GROUP_A", "GOOD")
    queue.flush(10)


def test_a_flush_never_takes_a_damaged_row_for_delivered(per, make_queue, outbox):
    """A row that is found damaged is raised by a flush, once, as an `OutboxError` (invariant 4)."""
    queue = make_queue(drain=False)
    record(queue, 5)
    queue.close()
    with sqlite3.connect(outbox) as connection:
        connection.execute("UPDATE perqueue_activity SET user_id = 'SOMEBODY ELSE' WHERE id = 3")
    connection.close()
    queue = make_queue()
    with pytest.raises(OutboxError, match=r"damaged.*perqueue doctor"):
        queue.flush(10)
    assert {activity.user_id for activity in per.activities} == {"USER_0", "USER_1", "USER_3", "USER_4"}
    assert queue.stats().damaged == 1
    queue.flush(10)


def test_a_timeout_counts_a_large_backlog_without_going_through_it(make_queue, monkeypatch):
    """`FlushTimeout.pending` is right however many are pending, or the text says "at least"."""
    monkeypatch.setattr("perqueue._flush._COUNT_LIMIT", 20)
    queue = make_queue(drain=False)
    record(queue, 50)
    with pytest.raises(FlushTimeout, match=r"^50 activities") as caught:
        queue.flush(0)
    assert caught.value.pending == 50
    flush = queue._new_flush(0)
    record(queue, 10)
    with pytest.raises(FlushTimeout, match=r"^at least 50 activities") as caught:
        flush.run(queue._observer.waiters)
    assert caught.value.pending == 50
