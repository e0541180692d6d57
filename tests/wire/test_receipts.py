"""Receipts: waiting for one activity, from threads and from event loops."""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from perqueue import (
    ActivityRejected,
    AuthenticationError,
    ConfigurationError,
    DrainState,
    FlushTimeout,
    OutboxError,
    PerQueue,
    PerQueueError,
    QueueClosed,
    RetryPolicy,
)
from perqueue.sandbox import Hang, Refuse, Sandbox, Status
from tests.helpers import quickest


def test_a_receipt_gives_the_transaction_id(per, make_queue):
    """`wait()` returns the ID under which Per has this activity, and again whenever it is asked."""
    receipt = make_queue().record("GROUP_A", "USER_1")
    assert receipt.wait(5) == per.activities[0].transaction_id
    assert receipt.wait(0) == receipt.wait() == per.activities[0].transaction_id


def test_awaiting_a_receipt_gives_the_same(per, make_queue):
    """`await receipt` is `wait()` for asyncio; a receipt may be awaited more than once."""
    queue = make_queue()

    async def main():
        receipt = queue.record("GROUP_A", "USER_1")
        return await receipt, await receipt, receipt.wait(0)

    assert set(asyncio.run(main())) == {per.activities[0].transaction_id}


def test_many_receipts_are_gathered(per, make_queue):
    """Each of many awaited receipts has its own transaction ID."""
    queue = make_queue()

    async def main():
        receipts = [queue.record("GROUP_A", f"USER_{number}") for number in range(300)]
        return await asyncio.gather(*receipts)

    ids = asyncio.run(main())
    by_id = {activity.transaction_id: activity.user_id for activity in per.activities}
    assert [by_id[each] for each in ids] == [f"USER_{number}" for number in range(300)]
    assert not queue._observer.waiters.any()


def test_several_event_loops_and_threads_wait_at_once(per, make_queue):
    """One queue serves loops in several threads, and threads without a loop, at the same time."""
    queue = make_queue()
    shared = queue.record("SHARED", "USER")

    def in_a_loop(number):
        async def main():
            mine = [queue.record(f"LOOP_{number}", f"USER_{each}") for each in range(20)]
            return await asyncio.gather(shared, *mine)

        return asyncio.run(main())

    def in_a_thread(number):
        mine = [queue.record(f"THREAD_{number}", f"USER_{each}") for each in range(20)]
        return [receipt.wait(10) for receipt in (shared, *mine)]

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, n) for n in range(4) for work in (in_a_loop, in_a_thread)]
        results = [future.result(20) for future in futures]
    assert len({result[0] for result in results}) == 1
    assert len({each for result in results for each in result}) == 1 + 8 * 20 == per.accepted


def test_cancelling_an_await_cancels_only_the_await(per, make_queue):
    """The activity is delivered all the same, and another await of the same receipt goes on."""
    per.set_fault(Hang(accept=True))
    queue = make_queue()

    async def main():
        receipt = queue.record("GROUP_A", "USER_1")

        async def wait():
            return await receipt

        first, second = asyncio.create_task(wait()), asyncio.create_task(wait())
        await asyncio.to_thread(per.wait_for_requests, 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(0.01):
                await receipt
        assert not isinstance(caught.value, PerQueueError)
        per.release()
        return await second

    assert asyncio.run(main()) == per.activities[0].transaction_id
    assert per.accepted == 1
    assert not queue._observer.waiters.any()


def test_a_loop_that_ends_while_a_receipt_is_awaited_does_no_harm(per, make_queue):
    """A program's event loop may go away at any time: delivery goes on."""
    per.set_fault(Hang(accept=True))
    queue = make_queue()
    receipts = []

    async def main():
        receipts.append(queue.record("GROUP_A", "USER_1"))

        async def wait():
            return await receipts[0]

        task = asyncio.create_task(wait())
        await asyncio.to_thread(per.wait_for_requests, 1)
        assert not task.done()

    asyncio.run(main())
    per.release()
    assert receipts[0].wait(5) == per.activities[0].transaction_id


def test_a_wait_ends_at_its_timeout_and_says_why(per, make_queue, until):
    """`FlushTimeout` after the time given, with the reason; the activity is delivered later (invariant 3)."""
    per.set_fault(Status(500))
    queue = make_queue()
    receipt = queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().reason)

    def wait():
        with pytest.raises(FlushTimeout, match="HTTP 500") as caught:
            receipt.wait(0.5)
        assert caught.value.pending == 1

    assert 0.5 <= quickest(wait, 0.8) < 0.8
    per.clear_faults()
    assert receipt.wait(None) == per.activities[0].transaction_id


@pytest.mark.parametrize("timeout", [-1, "5", float("nan"), float("inf"), 1e300, True])
def test_a_timeout_that_is_none_is_refused(make_queue, timeout):
    """A wait for a time that no clock can count is a `ConfigurationError`, for receipts and for flush."""
    queue = make_queue()
    receipt = queue.record("GROUP_A", "USER_1")
    with pytest.raises(ConfigurationError, match="timeout must be"):
        receipt.wait(timeout)
    with pytest.raises(ConfigurationError, match="timeout must be"):
        queue.flush(timeout)


def test_a_wait_wakes_a_backoff(per, make_queue, until):
    """Somebody who waits is worth a try at once, however long the backoff would be (invariant 4)."""
    per.set_fault(Status(500), times=1)
    queue = make_queue(retry=RetryPolicy(base=10_000, cap=10_000))
    receipt = queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().state is DrainState.BACKING_OFF)
    began = time.monotonic()
    assert receipt.wait(5) == per.activities[0].transaction_id
    assert time.monotonic() - began < 2


def test_a_refused_activity_is_told_to_every_waiter(per, make_queue):
    """`ActivityRejected` with Per's reason, before and after it was settled, for threads and loops."""
    per.set_fault(Refuse("no such group"))
    queue = make_queue()

    async def main():
        receipt = queue.record("GROUP_A", "USER_1")
        return await asyncio.gather(receipt, receipt, return_exceptions=True), receipt

    results, receipt = asyncio.run(main())
    for error in results:
        assert isinstance(error, ActivityRejected)
        assert error.reason == "no such group"
    with pytest.raises(ActivityRejected):
        receipt.wait(0)


def test_awaiting_with_a_bad_token_raises(make_queue):
    """`await receipt` tells of a refused token like `wait()`."""
    queue = make_queue(activity_token="wrong")

    async def main():
        await queue.record("GROUP_A", "USER_1")

    with pytest.raises(AuthenticationError):
        asyncio.run(main())


def test_after_close_a_receipt_says_so(make_queue):
    """A receipt of a closed queue raises `QueueClosed`, awaited or not."""
    queue = make_queue()
    receipt = queue.record("GROUP_A", "USER_1")
    queue.close()
    with pytest.raises(QueueClosed):
        receipt.wait(5)

    async def main():
        await receipt

    with pytest.raises(QueueClosed):
        asyncio.run(main())


def test_closing_wakes_who_waits(per, make_queue):
    """Threads and loops that wait when the queue is closed are told, not left waiting."""
    per.set_fault(Hang())
    queue = make_queue(exit_timeout=0.1)
    receipt = queue.record("GROUP_A", "USER_1")
    started = threading.Barrier(3)

    def wait():
        started.wait(5)
        receipt.wait(30)

    def await_it():
        async def main():
            started.wait(5)
            await receipt

        asyncio.run(main())

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(wait), pool.submit(await_it)]
        started.wait(5)
        per.wait_for_requests(1)
        began = time.monotonic()
        queue.close()
        for future in futures:
            with pytest.raises(QueueClosed):
                future.result(5)
    assert time.monotonic() - began < 3


def test_a_receipt_does_not_keep_its_queue_alive(options, outbox):
    """A receipt is a number and a weak reference: a queue that was dropped ends, and the receipt says so."""
    queue = PerQueue(outbox, **options)
    receipt = queue.record("GROUP_A", "USER_1")
    del queue
    gc.collect()
    with pytest.raises(QueueClosed, match="safe in the outbox"):
        receipt.wait(5)
    assert repr(receipt) == "<Receipt 1>"


def test_receipts_are_numbered_as_the_outbox_is(make_queue):
    """A receipt's ID is the activity's number; numbers grow (invariant 5)."""
    queue = make_queue()
    assert [queue.record("GROUP_A", "USER_1").id for _ in range(5)] == [1, 2, 3, 4, 5]


def test_a_receipt_for_what_could_not_be_stored_raises_the_storage_error(make_queue, tmp_path):
    """With `on_record_error` a failed `record()` returns a receipt,
    whose wait raises that error (invariant 1).
    """
    errors = []
    queue = make_queue(max_pending=1, on_record_error=errors.append, drain=False)
    queue.record("GROUP_A", "USER_1")
    receipt = queue.record("GROUP_A", "USER_2")
    assert receipt.id == 0
    (error,) = errors
    assert isinstance(error, OutboxError)
    assert (error.activity.billing_id, error.activity.user_id) == ("GROUP_A", "USER_2")
    with pytest.raises(OutboxError, match="max_pending is 1"):
        receipt.wait(5)


def test_what_another_queue_delivers_is_told(per, make_queue):
    """A queue that only records hears of its activity from the one that delivers it (invariant 5)."""
    recorder = make_queue(drain=False, activity_token=None)
    receipt = recorder.record("GROUP_A", "USER_1")
    with pytest.raises(FlushTimeout, match="perqueue drain"):
        receipt.wait(0.2)
    make_queue()
    assert receipt.wait(5) == per.activities[0].transaction_id


def test_waiting_from_a_callback_is_refused(make_queue):
    """A callback runs on the drain's thread: waiting there would wait for itself, so it is refused."""
    with Sandbox(activity_types=["GOOD"]) as per:
        caught, done = [], threading.Event()

        def callback(_activity):
            for wait in (lambda: receipt.wait(5), lambda: queue.flush(5)):
                try:
                    wait()
                except PerQueueError as error:
                    caught.append(str(error))
            done.set()

        queue = make_queue(base_url=per.url, on_rejected=callback)
        receipt = queue.record("GROUP_A", "USER_1", activity_type_id="TYPO")
        assert done.wait(5)
        assert len(caught) == 2
        assert all("must not wait" in text for text in caught)
        queue.record("GROUP_A", "USER_2", activity_type_id="GOOD").wait(5)


def test_those_who_wait_first_at_once_share_a_follower(make_queue, monkeypatch):
    """A queue that only records begins to listen when somebody waits: once, however many begin together."""
    queue = make_queue(drain=False)
    receipts = [queue.record("GROUP", f"USER_{number}") for number in range(2)]
    make, together = queue._make_worker, threading.Barrier(2)

    def make_slowly():
        with suppress(threading.BrokenBarrierError):
            together.wait(0.5)  # for the other one, which must not come
        return make()

    monkeypatch.setattr(queue, "_make_worker", make_slowly)

    def wait(receipt):
        with pytest.raises(FlushTimeout):
            receipt.wait(1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(wait, receipts))
    assert [thread.name for thread in threading.enumerate()].count("perqueue-drain") == 1


def test_a_closed_queue_begins_to_listen_no_more(make_queue):
    """Whoever begins to wait while the queue is being closed is told, and leaves no thread."""
    queue = make_queue(drain=False)
    queue.record("GROUP", "USER")
    flush = queue._new_flush(10)
    queue.close()
    with pytest.raises(QueueClosed):
        flush._nudge()
    assert queue._worker is None
