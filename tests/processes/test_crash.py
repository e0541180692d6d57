"""`kill -9` at any moment: what was acknowledged arrives."""

import os
import random
import signal
import time

from perqueue import PerQueue
from tests.helpers import AckPipe, Child, repeats, users

MAX_IN_FLIGHT = 8
UNSETTLED = 2 * 64
"""Outcomes that may have gathered for one transaction when the process is killed."""

RECORD_IN_FOUR_THREADS = """
    acks, acknowledge_first = int(sys.argv[1]), len(sys.argv) > 2
    from perqueue._worker import warm_up

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

    warm_up()  # once; each run is a fork of this process, which has no queue itself
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
        with Child(RECORD_IN_FOUR_THREADS, pipe.writer, *more, env=env, pass_fds=[pipe.writer]) as child:
            for run in range(runs):
                child.tell(run)
                pid = int(child.expect("ready"))
                pipe.drain(random.uniform(0.02, 0.25))
                os.kill(pid, signal.SIGKILL)
                child.expect("dead")
        return pipe.acknowledged()


def deliver_the_rest(queue):
    queue.flush(40)
    assert queue.stats().pending == 0


def test_kill_9_loses_nothing_that_was_acknowledged(per, env, make_queue, record_property):
    """20 times killed while 4 threads record and the drain delivers: every acknowledged activity arrives.

    And no more are sent twice than were in flight or not yet settled at a kill (invariants 1 to 3).
    """
    kills = 20
    acknowledged = kill_at_random(env, kills)
    deliver_the_rest(make_queue(activity_type_id="TYPE"))
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


def test_kill_9_right_after_record(per, env, make_queue, outbox):
    """A process that dies in the instant in which record() returns has recorded (invariant 1)."""
    script = """
    queue = PerQueue(drain=False)
    for n in range(int(sys.argv[1])):
        receipt = queue.record("GROUP", f"USER_{n}")
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with Child(script, 100, env=env) as child:
        assert child.wait() == -9
    queue = make_queue(activity_type_id="TYPE")
    assert queue.stats().pending + queue.stats().delivered == 100
    queue.flush(20)
    assert sorted(users(per)) == sorted(f"USER_{n}" for n in range(100))


def test_backlog_is_delivered_by_the_next_start(per, outbox, options):
    """A queue with a backlog starts delivering at construction, without a record()."""
    first = PerQueue(outbox, **{**options, "drain": False})
    for n in range(50):
        first.record("GROUP", f"USER_{n}")
    first.close()
    began = time.monotonic()
    second = PerQueue(outbox, **options)
    per.wait_for(50)
    second.close()
    assert time.monotonic() - began < 5
