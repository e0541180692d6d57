"""`on_stalled`: told once for each stall, wherever a queue is open, whoever is to deliver."""

import threading

import pytest

from perqueue import DrainState, OutboxError, RetryPolicy
from perqueue.sandbox import BadToken, Status

QUICK = RetryPolicy(base=0.05, cap=0.1)


class Told:
    """What `on_stalled` was called with, and on which threads."""

    def __init__(self):
        self.stats, self.threads = [], []

    def __call__(self, stats):
        self.stats.append(stats)
        self.threads.append(threading.current_thread().name)


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr("perqueue._delivery.drain.OBSERVER_INTERVAL", 0.1)
    return Told()


def test_a_stall_is_told_once_and_so_is_the_next(per, make_queue, until, told):
    """An outage is told once; after it everything may stall again, and that is told again."""
    queue = make_queue(on_stalled=told, stalled_after=0.3, retry=QUICK)
    for stall in (1, 2):
        per.set_fault(Status(503))
        queue.record("GROUP_A", f"USER_{stall}")
        queue.record("GROUP_A", f"OTHER_{stall}")
        until(lambda stall=stall: len(told.stats) == stall)
        per.clear_faults()
        queue.flush(10)
        until(lambda: not queue._observer._stalled)
    assert [stats.pending for stats in told.stats] == [2, 2]
    assert all(stats.oldest_pending_age > 0.3 for stats in told.stats)
    assert {stats.state for stats in told.stats} == {DrainState.BACKING_OFF}
    assert "HTTP 503" in told.stats[0].reason
    assert set(told.threads) == {"perqueue-drain"}


def test_a_queue_that_only_records_is_told_that_nobody_delivers(per, make_queue, until, told):
    """With `drain=False` too: that is who has no other way to notice that the drainer is gone."""
    queue = make_queue(drain=False, on_stalled=told, stalled_after=0.3)
    queue.record("GROUP_A", "USER_1")
    until(lambda: told.stats)
    (stats,) = told.stats
    assert (stats.pending, stats.state) == (1, DrainState.OFF)
    assert per.requests == 0
    drainer = make_queue()
    drainer.flush(10)
    until(lambda: not queue._observer._stalled)
    drainer.close()
    queue.record("GROUP_A", "USER_2")
    until(lambda: len(told.stats) == 2)


def test_a_queue_that_only_records_finds_an_old_backlog(make_queue, until, told):
    """What was pending before it was made is noticed without a record()."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    make_queue(drain=False, on_stalled=told, stalled_after=0.1)
    until(lambda: told.stats)


def test_without_the_callback_a_queue_that_only_records_has_no_drain_thread(make_queue):
    """It costs a thread only whoever asks for it."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    assert "perqueue-drain" not in {thread.name for thread in threading.enumerate()}


def test_a_standby_is_told(per, make_queue, until, told):
    """A process that waits to take over learns that the one that drains gets nothing through."""
    make_queue().record("GROUP_A", "USER_0").wait(10)
    per.set_fault(Status(503))
    standby = make_queue(on_stalled=told, stalled_after=0.3)
    standby.record("GROUP_A", "USER_1")
    until(lambda: told.stats)
    (stats,) = told.stats
    assert stats.state in (DrainState.BACKING_OFF, DrainState.STANDBY)
    assert standby._worker.standby


def test_a_pause_is_told(per, make_queue, until, told):
    """While the token is refused nothing is drained, and the stall is told all the same."""
    queue = make_queue(on_stalled=told, stalled_after=0.3)
    queue.record("GROUP_A", "USER_0").wait(10)  # however long it takes to begin
    per.set_fault(BadToken())
    queue.record("GROUP_A", "USER_1")
    until(lambda: told.stats)
    assert told.stats[0].state is DrainState.PAUSED
    assert "bad token" in told.stats[0].reason


def test_outcomes_that_cannot_be_written_are_a_stall(per, make_queue, until, told):
    """While the disk takes no outcome, nothing is sent, and the stall is told."""
    queue = make_queue(on_stalled=told, stalled_after=0.3)
    settle = queue._outbox.settle
    queue._outbox.settle = lambda *_, **__: (_ for _ in ()).throw(OutboxError("the disk is full"))
    queue.record("GROUP_A", "USER_1")
    until(lambda: told.stats)
    assert told.stats[0].reason == "the disk is full"
    queue._outbox.settle = settle
    queue.flush(10)
    assert per.accepted == 1
