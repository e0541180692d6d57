"""`kill -9` right after record(), and the start after it; at random moments: tests/faults/test_kill.py."""

import time

from perqueue import PerQueue
from tests.helpers import Child, users


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
