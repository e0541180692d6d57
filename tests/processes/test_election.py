"""Several processes, one outbox: one delivers, the others stand by, and anybody can wait."""

import asyncio
import random
import statistics
import time

import pytest

from perqueue import AuthenticationError, DrainState, FlushTimeout
from tests.helpers import Child, least, repeats, until, users

DRAIN = """
    queue = PerQueue(exit_timeout=0)
    queue.record("GROUP", f"START_{os.getpid()}")
    say("ready")
    while line := hear():
        if line == "stats":
            stats = queue.stats()
            say(f"{stats.state} {stats.pending} {stats.delivered} {stats.reason}")
        elif line == "flush":
            try:
                queue.flush(10)
            except PerQueueError as error:
                say(type(error).__name__)
            else:
                say("flushed")
        else:
            queue.record("GROUP", line)
            say("recorded")
    queue.close()
"""


def state_of(child):
    child.tell("stats")
    return child.expect("").split()[0]


def draining(child):
    return state_of(child) in ("idle", "delivering")


def test_one_drains_and_the_other_takes_over(per, env, record_property):
    """While one process drains the other is standby, and takes over within 2 s of a kill -9 (invariant 5)."""

    def takeover():
        before = per.accepted
        with Child(DRAIN, env=env) as first:
            first.expect("ready")
            per.wait_for(before + 1)
            with Child(DRAIN, env=env) as second:
                second.expect("ready")
                per.wait_for(before + 2)
                until(lambda: state_of(second) == "standby", "the second stands by")
                until(lambda: state_of(first) == "idle", "the first is done")
                first.kill()
                killed = time.monotonic()
                second.tell(f"AFTER_THE_KILL_{before}")
                second.expect("recorded")
                per.wait_for(before + 3)
                took = time.monotonic() - killed
                until(lambda: draining(second), "the second drains")
        return took

    took = least(takeover, 2)
    record_property("takeover_seconds", took)
    print(f"taken over after {took:.2f} s")
    assert took < 2
    assert repeats(per) == 0


def test_two_processes_deliver_nothing_twice(per, env):
    """Two processes that record and drain at full speed deliver each activity once (invariant 5)."""
    script = """
    queue = PerQueue()
    for n in range(300):
        queue.record("GROUP", f"{os.getpid()}-{n}")
    queue.flush(30)
    queue.close()
    """
    with Child(script, env=env) as first, Child(script, env=env) as second:
        first.succeed(40)
        second.succeed(40)
    assert per.accepted == 600
    assert repeats(per) == 0


def test_clean_handover_sends_nothing_twice(per, env, make_queue):
    """When the drainer closes in the middle of a backlog, the next one goes on exactly where it ended."""
    queue = make_queue(activity_type_id="TYPE")
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        for n in range(300):
            queue.record("GROUP", f"USER_{n}")
        per.wait_for(50)
        queue.close()
        per.wait_for(301, timeout=20)
        child.tell("flush")
        child.expect("flushed")
    assert repeats(per) == 0


def test_paused_drainer_lets_go(per, env):
    """A drainer whose token is refused lets go of the lock; a good token takes over (invariant 5)."""
    with Child(DRAIN, env={**env, "PER_ACTIVITY_TOKEN": "wrong-token"}) as wrong:
        wrong.expect("ready")
        until(lambda: state_of(wrong) == "paused", "the first is paused")
        with Child(DRAIN, env=env) as right:
            right.expect("ready")
            per.wait_for(2)
            until(lambda: draining(right), "the second drains")
            until(lambda: state_of(wrong) in ("idle", "standby"), "the pause is over for both")
            wrong.tell("RECORDED_BY_THE_PAUSED")
            wrong.expect("recorded")
            per.wait_for(3)
            wrong.tell("flush")
            wrong.expect("flushed")
    assert repeats(per) == 0


def test_stats_show_every_process_the_pause(per, env, make_queue):
    """The reason of a pause is in the outbox: a process that only records shows it too (invariant 6)."""
    with Child(DRAIN, env={**env, "PER_ACTIVITY_TOKEN": "wrong-token"}) as wrong:
        wrong.expect("ready")
        until(lambda: state_of(wrong) == "paused", "the drainer is paused")
        queue = make_queue(drain=False, activity_token=None)
        stats = queue.stats()
        assert stats.state is DrainState.PAUSED
        assert "invalid_auth_token" in stats.reason


def test_records_of_others_are_delivered_soon(per, env, make_queue, record_property):
    """What one process records, another that drains delivers within a tenth of a second or so."""
    recorder = make_queue(drain=False, activity_type_id="TYPE")
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        per.wait_for(1)
        waits = []

        def longest_of_ten():
            waits.clear()
            for n in range(10):
                time.sleep(random.uniform(0.05, 0.2))  # a moment that the drainer does not expect
                before = per.accepted
                began = time.monotonic()
                recorder.record("GROUP", f"USER_{n}")
                per.wait_for(before + 1)
                waits.append(time.monotonic() - began)
            return max(waits)

        longest = least(longest_of_ten, 1)
        record_property("wake_seconds", longest)
        print(f"delivered {sum(waits) / 10:.3f} s after record(), at most {longest:.3f} s")
        assert longest < 1
        assert statistics.median(waits) < 0.5


def test_process_that_only_records_can_wait(per, env, make_queue):
    """flush(), receipt.wait() and await return when another process has delivered (invariant 4)."""
    recorder = make_queue(drain=False, activity_type_id="TYPE")
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        transaction = recorder.record("GROUP", "USER_1").wait(10)
        assert transaction in {activity.transaction_id for activity in per.activities}
        recorder.record("GROUP", "USER_2")
        recorder.flush(10)
        assert "USER_2" in users(per)

        async def wait_in_a_loop():
            receipts = [recorder.record("GROUP", f"ASYNC_{n}") for n in range(5)]
            transactions = await asyncio.gather(*receipts)
            recorder.record("GROUP", "ASYNC_LAST")
            await recorder.aflush(10)
            return transactions

        assert len(set(asyncio.run(wait_in_a_loop()))) == 5
        assert "ASYNC_LAST" in users(per)


def test_standby_can_wait_through_a_takeover(per, env, make_queue):
    """A flush() in a standby process outlives the drainer: the process takes over and delivers itself."""
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        per.wait_for(1)
        queue = make_queue(activity_type_id="TYPE")
        queue.record("GROUP", "USER_1").wait(10)
        until(lambda: queue.stats().state is DrainState.STANDBY, "this process stands by")
        child.kill()
        queue.record("GROUP", "USER_2")
        queue.flush(10)
    assert set(users(per)) >= {"USER_1", "USER_2"}


def test_nobody_drains(make_queue):
    """When nobody drains, flush() and wait() end in time and name the remedy (invariants 4 and 11)."""
    queue = make_queue(drain=False)
    receipt = queue.record("GROUP", "USER")
    for wait in (queue.flush, receipt.wait, lambda timeout: asyncio.run(queue.aflush(timeout))):
        began = time.monotonic()
        with pytest.raises(FlushTimeout, match="perqueue drain") as caught:
            wait(0.3)
        assert 0.25 < time.monotonic() - began < 2
        assert caught.value.pending == 1


def test_waiting_for_a_drainer_with_a_bad_token(per, env, make_queue):
    """flush() in a process that only records raises AuthenticationError, from the other's fresh probe."""
    recorder = make_queue(drain=False, activity_type_id="TYPE")
    with Child(DRAIN, env={**env, "PER_ACTIVITY_TOKEN": "wrong-token"}) as wrong:
        wrong.expect("ready")
        until(lambda: state_of(wrong) == "paused", "the drainer is paused")
        recorder.record("GROUP", "USER")
        with pytest.raises(AuthenticationError):
            recorder.flush(5)


def test_idle_drainer_costs_next_to_nothing(per, env, record_property):
    """A draining process with nothing to do uses less than 1 % of a CPU."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "USER")
    queue.flush(10)
    time.sleep(0.3)
    before, began = time.process_time(), time.monotonic()
    time.sleep(1.5)
    say((time.process_time() - before) / (time.monotonic() - began))
    queue.close()
    """
    with Child(script, env=env, measured=False) as child:
        share = float(child.expect("", timeout=20))
        child.succeed()
    record_property("idle_cpu_percent", 100 * share)
    print(f"idle: {100 * share:.2f} % of a CPU")
    assert share < 0.01


def test_drain_lock_dies_with_its_process(per, env, outbox):
    """The lock is the operating system's: a lock file that a dead process left keeps nobody out."""
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        per.wait_for(1)
        child.kill()
    assert outbox.with_name(f"{outbox.name}-drain.lock").exists()
    with Child(DRAIN, env=env) as child:
        child.expect("ready")
        per.wait_for(2)
