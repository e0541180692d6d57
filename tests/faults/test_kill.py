"""`kill -9` while four threads record and the drain delivers: nothing that was acknowledged is lost."""

import os
import random
import signal
import sqlite3

import pytest

from tests.faults._rounds import rounds
from tests.helpers import AckPipe, Child, repeats, users

MAX_IN_FLIGHT = 8
UNSETTLED = 2 * 64
"""Outcomes that may have gathered for one transaction when the process is killed."""

RECORD_IN_FOUR_THREADS = """
    acks, acknowledge_first = int(sys.argv[1]), len(sys.argv) > 2
    import filelock, perqueue._wire.exchange, perqueue._delivery.worker  # once; each run is a fork of this

    def work(queue, run, thread):
        n = 0
        while True:
            user = f"{run}-{thread}-{n}"
            if acknowledge_first:
                os.write(acks, f"{user}\\n".encode())
                time.sleep(0.01)
                queue.record("GROUP", user)
            else:
                queue.record("GROUP", user)
                os.write(acks, f"{user}\\n".encode())
            n += 1
            if n % 5 == 0:
                time.sleep(0.02)

    while run := hear():
        if pid := os.fork():
            os.waitpid(pid, 0)
            say("dead")
            continue
        queue = PerQueue(max_in_flight=8)
        for thread in range(4):
            threading.Thread(target=work, args=(queue, run, thread), daemon=True).start()
        say(f"ready {os.getpid()}")
        while True:
            time.sleep(60)
"""


def kill_at_random(env, runs, *more):
    """Run and kill recorders on one outbox; return what they acknowledged."""
    with AckPipe() as pipe:
        arguments = (RECORD_IN_FOUR_THREADS, pipe.writer, *more)
        with Child(*arguments, env=env, pass_fds=[pipe.writer], measured=False) as child:
            for run in range(runs):
                child.tell(run)
                pid = int(child.expect("ready"))
                pipe.drain(random.uniform(0.02, 0.25))
                os.kill(pid, signal.SIGKILL)
                child.expect("dead")
        return pipe.acknowledged()


def deliver_the_rest(queue):
    queue.flush(60)
    assert queue.stats().pending == 0


def assert_intact(outbox):
    connection = sqlite3.connect(outbox)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@pytest.mark.timeout(rounds(120, 900))
def test_kill_9_loses_nothing_that_was_acknowledged(per, env, make_queue, outbox, record_property):
    """Killed again and again while 4 threads record and the drain delivers, every acknowledged one arrives.

    And no more are sent twice than were in flight or not yet settled at a kill (invariants 1 to 3).
    """
    kills = rounds(20, 200)
    acknowledged = kill_at_random(env, kills)
    deliver_the_rest(make_queue(activity_type_id="TYPE"))
    assert_intact(outbox)
    lost = set(acknowledged) - set(users(per))
    twice = repeats(per)
    record_property("acknowledged", len(acknowledged))
    record_property("duplicates_per_kill", twice / kills)
    print(f"{len(acknowledged)} acknowledged, {len(lost)} lost, {twice / kills:g} sent twice per kill")
    assert len(acknowledged) > 20 * kills
    assert lost == set()
    assert twice <= kills * (MAX_IN_FLIGHT + UNSETTLED)


def test_checker_sees_a_recorder_that_loses(per, env, make_queue):
    """A recorder that acknowledges before record() does lose, and the same check finds it."""
    acknowledged = kill_at_random(env, 3, "acknowledge first")
    deliver_the_rest(make_queue(activity_type_id="TYPE"))
    assert set(acknowledged) - set(users(per))
