"""When outcomes cannot be stored: they are held, nothing more is sent, and it mends itself (invariant 12)."""

import time

import pytest

from perqueue import DrainState, OutboxError
from perqueue.sandbox import Hang, Latency
from tests.helpers import Child, repeats, until
from tests.outbox.test_trouble import LOCKER

IN_FLIGHT = 8


def test_lock_during_the_drain(per, make_queue, outbox, caplog):
    """While the file is locked for seconds, only what was in flight is sent, and nothing twice."""
    per.set_fault(Latency(0.01))
    queue = make_queue(max_in_flight=IN_FLIGHT)
    for n in range(400):
        queue.record("GROUP", f"USER_{n}")
    per.wait_for(40)
    with Child(LOCKER, outbox, isolated=True) as locker:
        locker.expect("locked")
        before = per.requests
        stats = until(lambda: _troubled(queue), "the drain notices", 30)
        assert "held its lock for over 1 s" in stats.reason
        time.sleep(1)  # long enough for hundreds of requests
        assert per.requests <= before + 3 * IN_FLIGHT
        assert per.accepted < 400
        locker.tell("release")
        locker.succeed()
    queue.flush(15)
    assert per.accepted == 400
    assert repeats(per) == 0
    assert queue.stats().delivered == 400
    assert queue.stats().reason is None
    assert caplog.text.count("delivery waits until the outbox works again") == 1


def _troubled(queue):
    """Return the stats of a queue whose drain is in trouble; while the file is locked they may raise."""
    try:
        stats = queue.stats()
    except OutboxError:
        return None
    return stats if stats.state is DrainState.PAUSED else None


def test_short_locks_do_not_matter(per, make_queue, outbox):
    """Somebody who locks the file for tenths of a second, again and again, delays but breaks nothing."""
    queue = make_queue(max_in_flight=IN_FLIGHT)
    for n in range(200):
        queue.record("GROUP", f"USER_{n}")
    for _ in range(4):
        with Child(LOCKER, outbox, 0.2, isolated=True) as locker:
            locker.expect("locked")
            locker.succeed()
    queue.flush(15)
    assert per.accepted == 200
    assert repeats(per) == 0


@pytest.mark.root
def test_full_disk_during_the_drain(per, make_queue, small_disk):
    """On a full disk answers are held and nothing more is sent; space mends it without a repeat."""
    per.set_fault(Hang(accept=True))
    queue = make_queue(small_disk / "outbox.db", max_in_flight=IN_FLIGHT)
    for n in range(300):
        queue.record("GROUP", f"USER_{n}")
    per.wait_for(1)
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            for size in (65536, 4096, 512):
                while True:
                    try:
                        file.write(b"x" * size)
                    except OSError:
                        break
        finally:
            per.clear_faults()
            per.release()
    stats = until(lambda: _troubled(queue), "the drain notices", 30)
    assert "disk is full" in stats.reason
    sent = per.requests
    time.sleep(1.2)
    assert per.requests <= sent + IN_FLIGHT
    assert per.accepted < 300
    ballast.unlink()
    queue.flush(15)
    assert per.accepted == 300
    assert repeats(per) == 0
    queue.close()


def test_outcomes_that_cannot_be_stored_at_the_end_are_sent_again(per, make_queue, outbox):
    """If even close() cannot store an outcome, the activity stays pending, and the next start sends it."""
    per.set_fault(Hang(accept=True))
    queue = make_queue(exit_timeout=1.0)
    queue.record("GROUP", "USER")
    per.wait_for(1)
    with Child(LOCKER, outbox, isolated=True) as locker:
        locker.expect("locked")
        per.clear_faults()
        per.release()
        queue.close()
        locker.tell("release")
        locker.succeed()
    again = make_queue()
    again.flush(10)
    assert per.accepted == 2
    assert again.stats().delivered == 1
