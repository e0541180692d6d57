"""How a queue ends: `close()`, context managers, dropping it, from anywhere and at any time."""

import asyncio
import gc
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from perqueue import DrainState, FlushTimeout, PerQueue, QueueClosed, RetryPolicy
from perqueue.sandbox import Hang, Latency, Refuse, Status


def record(queue, count, prefix="USER"):
    for number in range(count):
        queue.record("GROUP_A", f"{prefix}_{number}")


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("perqueue-")]


def test_with_flushes_then_closes(per, make_queue):
    """Leaving a `with` block delivers what was recorded in it, and ends the queue (invariant 4)."""
    with make_queue() as queue:
        record(queue, 50)
    assert per.unique("GROUP_A") == 50
    assert threads() == []
    with pytest.raises(QueueClosed):
        queue.record("GROUP_A", "USER")


def test_async_with_flushes_then_closes(per, make_queue):
    """`async with` does the same."""

    async def main():
        async with make_queue() as queue:
            record(queue, 50)
        return queue

    queue = asyncio.run(main())
    assert per.unique("GROUP_A") == 50
    with pytest.raises(QueueClosed):
        queue.flush()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_flush_that_fails_on_leaving_raises_and_closes(per, make_queue, kind):
    """A `with` block that could not deliver says so; the queue is closed,
    and everything is kept (invariant 3).
    """
    per.set_fault(Status(500))
    queue = make_queue(flush_timeout=0.2)

    def leave():
        with queue:
            record(queue, 3)

    async def aleave():
        async with queue:
            record(queue, 3)

    with pytest.raises(FlushTimeout):
        leave() if kind == "sync" else asyncio.run(aleave())
    with pytest.raises(QueueClosed):
        queue.stats()
    assert threads() == []
    per.clear_faults()
    make_queue().flush(10)
    assert per.unique("GROUP_A") == 3


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("outage", [False, True])
def test_an_exception_of_the_body_comes_out(per, make_queue, kind, outage):
    """The body's exception is raised,
    whether or not the flush works; what can be delivered is (invariant 3).
    """
    if outage:
        per.set_fault(Status(500))
    queue = make_queue(flush_timeout=0.2)

    def leave():
        with queue:
            record(queue, 3)
            raise ZeroDivisionError("the body's own")

    async def aleave():
        async with queue:
            record(queue, 3)
            raise ZeroDivisionError("the body's own")

    with pytest.raises(ZeroDivisionError, match="the body's own"):
        leave() if kind == "sync" else asyncio.run(aleave())
    assert per.unique("GROUP_A") == (0 if outage else 3)
    assert threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_only_closes(per, make_queue, error):
    """On Ctrl-C nobody waits for a flush: the block ends at once, everything is kept (invariant 3)."""
    per.set_fault(Status(500))
    queue = make_queue(flush_timeout=30)
    began = time.monotonic()

    def leave():
        with queue:
            record(queue, 3)
            raise error

    with pytest.raises(error):
        leave()
    assert time.monotonic() - began < 2
    per.clear_faults()
    make_queue().flush(10)
    assert per.unique("GROUP_A") == 3


def test_closing_inside_the_block_is_fine(per, make_queue):
    """A block whose body closed the queue leaves quietly."""
    with make_queue() as queue:
        record(queue, 3)
        queue.close()
    assert threads() == []


def test_what_is_undelivered_stays_for_the_next_start(per, make_queue):
    """`close()` loses nothing: the next queue on the outbox delivers it without being asked (invariant 3)."""
    per.go_down()
    first = make_queue()
    record(first, 100)
    first.close()
    per.come_back()
    second = make_queue()
    per.wait_for(100)
    assert second.get_report("2020-01-01T00:00:00Z").unique("GROUP_A") == 100


def test_after_close_everything_says_so(make_queue):
    """Every use of a closed queue is `QueueClosed`, and nothing is stored."""
    queue = make_queue()
    queue.close()
    for use in (
        lambda: queue.record("GROUP_A", "USER_1"),
        queue.flush,
        lambda: queue.flush(0),
        queue.stats,
        lambda: asyncio.run(queue.aflush()),
    ):
        with pytest.raises(QueueClosed):
            use()
    again = make_queue(drain=False)
    assert again.stats().pending == 0


def test_closing_twice_does_nothing_more(make_queue):
    """`close()` and `aclose()` may be called again and again."""
    queue = make_queue()
    record(queue, 3)
    queue.close()
    queue.close()
    asyncio.run(queue.aclose())
    assert threads() == []


def test_ten_threads_may_close_at_once(per, make_queue):
    """Whoever comes first closes; nobody fails, and no thread is left."""
    queue = make_queue()
    record(queue, 50)
    barrier = threading.Barrier(10)

    def close(_number):
        barrier.wait(5)
        queue.close()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(close, range(10)))
    assert threads() == []
    make_queue().flush(10)
    assert per.unique("GROUP_A") == 50


def test_ten_threads_record_while_another_closes(per, make_queue, arrived):
    """Whatever `record()` returned for is delivered by the next queue,
    even in the midst of a close (invariant 1).
    """
    queue = make_queue()
    recorded = []
    started = threading.Barrier(11)

    def work(number):
        mine = []
        started.wait(5)
        try:
            for each in range(100_000):
                queue.record("GROUP_A", f"{number}_{each}")
                mine.append(("GROUP_A", f"{number}_{each}"))
        except QueueClosed:
            pass
        recorded.extend(mine)

    with ThreadPoolExecutor(10) as pool:
        futures = [pool.submit(work, number) for number in range(10)]
        started.wait(5)
        per.wait_for(20)
        queue.close()
        for future in futures:
            future.result(20)
    left = make_queue(drain=False)
    with sqlite3.connect(left._settings.outbox) as connection:
        stored = {
            (row[0], row[1])
            for row in connection.execute("SELECT billing_id, user_id FROM perqueue_activity")
        }
    connection.close()
    assert set(recorded) <= stored
    assert len(stored) <= len(recorded) + 10
    assert arrived() <= stored


def test_closing_in_an_outage_is_quick(per, make_queue):
    """While the gate is closed there is nothing to wait for: closing takes no time (invariant 11)."""
    per.set_fault(Status(503))
    queue = make_queue(exit_timeout=10)
    record(queue, 100)
    per.wait_for_requests(2)
    began = time.monotonic()
    queue.close()
    assert time.monotonic() - began < 5


def test_closing_waits_for_requests_in_flight_up_to_the_exit_timeout(per, make_queue):
    """A request that hangs holds up `close()` for `exit_timeout` and no longer (invariant 11)."""
    per.set_fault(Hang())
    queue = make_queue(exit_timeout=0.5)
    record(queue, 1)
    per.wait_for_requests(1)
    began = time.monotonic()
    queue.close()
    assert 0.4 < time.monotonic() - began < 4


def test_what_was_in_flight_is_settled_not_sent_again(per, make_queue):
    """An answer that arrives while closing is written: the next start does not send that activity again."""
    per.set_fault(Latency(0.3))
    queue = make_queue(exit_timeout=10)
    record(queue, 1)
    per.wait_for_requests(1)
    queue.close()
    per.clear_faults()
    again = make_queue()
    assert again.stats().delivered == 1
    again.flush(5)
    assert per.requests == 1


def test_closing_inside_a_running_loop(per, make_queue):
    """`aclose()` leaves the loop free, and a plain `close()` inside a coroutine works as well."""

    async def main():
        first, second = make_queue(), make_queue()
        record(first, 5)
        await first.aflush(5)
        await first.aclose()
        second.close()

    asyncio.run(main())
    assert per.accepted == 5
    assert threads() == []


def test_a_callback_may_close_the_queue(per, make_queue, until):
    """`on_rejected` may decide to stop: the thread that calls it ends afterwards."""
    per.set_fault(Refuse("no such group"))
    closed = threading.Event()

    def stop(_activity):
        queue.close()
        closed.set()

    queue = make_queue(on_rejected=stop)
    queue.record("GROUP_A", "USER_1")
    assert closed.wait(5)
    until(lambda: threads() == [], timeout=8)
    with pytest.raises(QueueClosed):
        queue.record("GROUP_A", "USER_2")
    assert make_queue(drain=False).stats().rejected == 1


def test_a_queue_that_is_dropped_stops_its_threads(per, options, outbox, until):
    """Dropped without `close()`, a queue ends by itself, and what it recorded is on disk (invariants 1,
    3).
    """
    per.set_fault(Status(500))
    queue = PerQueue(outbox, **options)
    record(queue, 5)
    per.wait_for_requests(1)
    assert threads() != []
    del queue
    gc.collect()
    until(lambda: threads() == [], timeout=8)
    per.clear_faults()
    with PerQueue(outbox, **options) as again:
        assert again.stats().pending == 5
    assert per.unique("GROUP_A") == 5


def test_a_queue_that_was_never_used_does_nothing(per, make_queue, outbox):
    """Nothing pending, nothing recorded: its thread sleeps, stands for no election, and sends nothing."""
    queue = make_queue()
    assert queue.stats().state is DrainState.IDLE
    queue.close()
    assert per.requests == 0
    assert not outbox.with_name(f"{outbox.name}-drain.lock").exists()


def test_opening_and_closing_thirty_times_leaks_nothing(per, make_queue):
    """Descriptors and threads are given back each time."""
    with make_queue() as queue:
        record(queue, 1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(30):
        with make_queue() as queue:
            record(queue, 1, f"ROUND_{number}")
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert per.unique("GROUP_A") == 31


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_nothing_that_a_transport_raises_ends_the_drain(make_queue, error):
    """Whatever comes out of a given transport is no answer: the activity is sent again (invariant 8)."""
    tries = []

    def answer(request):
        tries.append(request)
        if len(tries) < 3:
            raise error
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "t"}})

    queue = make_queue(transport=httpx.MockTransport(answer), retry=RetryPolicy(base=0.01))
    receipt = queue.record("GROUP_A", "USER")
    assert receipt.wait(10) == "t"
    record(queue, 5)
    queue.flush(10)


def test_a_drain_that_cannot_be_elected_says_why(make_queue, outbox, until):
    """A lock file that cannot be used stands in `stats()`, and delivery goes on once it can."""
    lock = outbox.with_name(f"{outbox.name}-drain.lock")
    lock.mkdir()  # root may open any file, but nobody a directory as one
    queue = make_queue()
    record(queue, 1)
    until(lambda: queue.stats().state is DrainState.PAUSED)
    assert "drain lock cannot be taken" in queue.stats().reason
    with pytest.raises(FlushTimeout, match="drain lock cannot be taken"):
        queue.flush(0.1)
    lock.rmdir()
    queue.flush(10)
    until(lambda: queue.stats().state is DrainState.IDLE)
