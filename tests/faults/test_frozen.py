"""Processes that are frozen (SIGSTOP, a debugger) and thawed: all goes on, and nothing is lost."""

import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from perqueue import FlushTimeout, OutboxError
from perqueue.sandbox import Latency
from tests.faults._rounds import rounds
from tests.helpers import AckPipe, Child, repeats, until, users

MAX_IN_FLIGHT = 8

OBEY = """
    queue = PerQueue(max_in_flight=8, request_timeout=1.0)
    say("ready")
    while line := hear():
        if line == "stats":
            say(queue.stats().state)
        else:
            queue.record("GROUP", line)
            say("recorded")
    queue.close()
"""


def freeze(child):
    """Stop a process, and wait until it has stopped."""
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: stopped(child), "it is frozen")


def freeze_between_writes(child, outbox):
    """Stop a process in a moment in which it does not hold the outbox's write lock."""

    def frozen():
        freeze(child)
        with closing(sqlite3.connect(outbox, isolation_level=None, timeout=0)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                thaw(child)
                return False
        return True

    until(frozen, "it is frozen without the lock")


def stopped(child):
    return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def thaw(child):
    os.kill(child.pid, signal.SIGCONT)


def record(child, user):
    child.tell(user)
    child.expect("recorded")


def test_frozen_drainer(per, env, make_queue, outbox):
    """A drainer that is frozen with requests under way keeps the lock, and delivers the rest once thawed.

    Meanwhile others record, and their flush() ends in its time; no more are sent twice than were in flight.
    """
    with Child(OBEY, env=env) as drainer:
        drainer.expect("ready")
        record(drainer, "FIRST")
        per.wait_for(1)
        other = make_queue(activity_type_id="TYPE")
        other.record("GROUP", "SECOND")
        until(lambda: other.stats().state == "standby", "the other stands by")
        per.set_fault(Latency(0.1))
        for n in range(40):
            record(drainer, f"BEFORE_{n}")
        per.wait_for(2)
        freeze_between_writes(drainer, outbox)
        for n in range(10):
            other.record("GROUP", f"MEANWHILE_{n}")
        with pytest.raises(FlushTimeout, match="standby"):
            other.flush(2.5)  # longer than it takes to replace one that is dead, and than request_timeout
        assert other.stats().pending > 10
        thaw(drainer)
        other.flush(20)
        record(drainer, "LAST")
        other.flush(20)
    wanted = (
        {f"BEFORE_{n}" for n in range(40)}
        | {f"MEANWHILE_{n}" for n in range(10)}
        | {"FIRST", "SECOND", "LAST"}
    )
    assert set(users(per)) == wanted
    assert repeats(per) <= MAX_IN_FLIGHT


def test_frozen_and_killed(per, env, make_queue, outbox):
    """A frozen drainer that is killed instead of thawed is replaced like any other."""
    with Child(OBEY, env=env) as drainer:
        drainer.expect("ready")
        record(drainer, "FIRST")
        per.wait_for(1)
        freeze_between_writes(drainer, outbox)
        queue = make_queue(activity_type_id="TYPE")
        queue.record("GROUP", "SECOND")
        until(lambda: queue.stats().state == "standby", "this one stands by")
        drainer.kill()
        queue.flush(10)
    assert set(users(per)) == {"FIRST", "SECOND"}


def test_frozen_recorder(per, env, make_queue, outbox):
    """A process that is frozen between two record() calls is in nobody's way, and goes on afterwards."""
    with Child(OBEY, env={**env, "PERQUEUE_DRAIN": "0"}) as recorder:
        recorder.expect("ready")
        record(recorder, "FIRST")
        freeze_between_writes(recorder, outbox)
        queue = make_queue(activity_type_id="TYPE")
        queue.record("GROUP", "SECOND")
        queue.flush(10)
        thaw(recorder)
        record(recorder, "THIRD")
        queue.flush(10)
    assert users(per) == ["FIRST", "SECOND", "THIRD"]


def test_frozen_with_the_write_lock(per, env, make_queue, outbox):
    """Frozen in the middle of a write, a process makes others' record() raise after a second, not hang.

    The drain waits, too, and delivers everything once it is thawed.
    """
    hold = """
    import sqlite3
    other = sqlite3.connect(sys.argv[1], isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    say("writing")
    hear()
    other.execute("COMMIT")
    say("done")
    """
    queue = make_queue(activity_type_id="TYPE")
    per.set_fault(Latency(0.3))
    for n in range(10):
        queue.record("GROUP", f"USER_{n}")
    with Child(hold, outbox, env=env) as holder:
        holder.expect("writing")
        freeze(holder)
        began = time.monotonic()
        with pytest.raises(OutboxError, match="over 1 s") as caught:
            queue.record("GROUP", "REFUSED")
        assert 0.8 < time.monotonic() - began < 5
        assert caught.value.activity.user_id == "REFUSED"
        assert queue.stats().pending > 0
        thaw(holder)
        holder.tell("go on")
        holder.expect("done")
        queue.record("GROUP", "LAST")
        queue.flush(20)
    assert set(users(per)) == {f"USER_{n}" for n in range(10)} | {"LAST"}
    assert repeats(per) == 0


RECORD_ALWAYS = """
    acks = int(sys.argv[1])
    queue = PerQueue(max_in_flight=8, durability=sys.argv[2])
    say("ready")
    n = 0
    while True:
        try:
            queue.record("GROUP", f"{os.getpid()}-{n}")
        except OutboxError as error:
            say(f"OutboxError {error}")
        else:
            os.write(acks, f"{os.getpid()}-{n}\\n".encode())
        n += 1
        if n % 20 == 0:
            time.sleep(0.02)
"""


@pytest.mark.timeout(rounds(120, 900))
def test_frozen_at_random(per, env, make_queue):
    """Frozen at any moment, recording or draining, a process costs others an OutboxError at most.

    Whatever it was doing is complete afterwards: what either acknowledged arrives.
    """
    queue, refused, slowest = make_queue(activity_type_id="TYPE", drain=False), 0, 0.0
    mine = set()
    with AckPipe() as pipe:
        children = [
            Child(RECORD_ALWAYS, pipe.writer, durability, env=env, pass_fds=[pipe.writer], measured=False)
            for durability in ("process", "power")
        ]
        with children[0], children[1]:
            for child in children:
                child.expect("ready")
            for n in range(rounds(12, 200)):
                child = random.choice(children)
                pipe.drain(random.uniform(0.01, 0.1))
                freeze(child)
                began = time.monotonic()
                try:
                    queue.record("GROUP", f"OTHER_{n}")
                    mine.add(f"OTHER_{n}")
                except OutboxError:
                    refused += 1
                slowest = max(slowest, time.monotonic() - began)
                thaw(child)
                queue.record("GROUP", f"AFTER_{n}")
                mine.add(f"AFTER_{n}")
        acknowledged = set(pipe.acknowledged())
    print(f"{refused} refused, the slowest record() took {slowest:.2f} s; {len(acknowledged)} acknowledged")
    assert slowest < 5
    queue.close()
    make_queue(activity_type_id="TYPE").flush(60)
    assert acknowledged | mine <= set(users(per))
    assert len(acknowledged) > 100
