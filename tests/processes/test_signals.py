"""Signal handlers that record, or raise, in the middle of `record()`."""

import sqlite3

import pytest

from tests.helpers import Child, users

RECORDING_HANDLER = """
    import itertools
    queue = PerQueue(durability=sys.argv[1])
    numbers, handled, main, depth = itertools.count(), [], 0, 0

    def handler(*_):  # may itself be interrupted by the next signal
        global depth
        if depth == 5:
            return  # on a slow disk they would pile up without end
        depth += 1
        n = next(numbers)
        queue.record("GROUP", f"handler-{n}")
        handled.append(n)
        depth -= 1

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0005)
    while len(handled) < 30:
        queue.record("GROUP", f"main-{main}")
        main += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    queue.flush(20)
    queue.close()
    say(main)
    say(len(handled))
"""


@pytest.mark.parametrize("durability", ["process", "power"])
def test_handler_may_record_inside_record(per, env, durability):
    """A signal handler may record while its thread is inside record(): nothing hangs, nothing is lost."""
    with Child(RECORDING_HANDLER, durability, env=env, measured=False) as child:
        main, handled = map(int, child.succeed(40))
    assert main > 0
    assert sorted(users(per)) == sorted(
        [f"main-{n}" for n in range(main)] + [f"handler-{n}" for n in range(handled)]
    )


def test_handler_may_record_inside_the_first_record(per, env, tmp_path):
    """A signal in the very first record(), which starts the threads, does not hang it."""
    script = """
    def handler(*_):
        if queue is not None:
            queue.record("GROUP", "handler")
    queue = None
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
    for n in range(40):
        queue = PerQueue(f"{sys.argv[1]}/{n % 4}.db")
        queue.record("GROUP", f"main-{n}")
        last, queue = queue, None
        last.close()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for n in range(4):
        with PerQueue(f"{sys.argv[1]}/{n}.db"):
            pass
    """
    with Child(script, tmp_path, env=env, measured=False) as child:
        child.succeed(30)
    assert {f"main-{n}" for n in range(40)} <= set(users(per))


RAISING_HANDLER = """
    queue = PerQueue(durability=sys.argv[1])

    class Alarm(BaseException):
        pass

    def handler(*_):
        raise Alarm

    queue.record("GROUP", "FIRST")
    signal.signal(signal.SIGALRM, handler)
    returned, raised = [], 0
    longest = 0.001  # a staircase: half of the alarms come too late, however long the disk takes just now
    for n in range(int(sys.argv[2])):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.00001 + longest * (n % 40) / 40)
                queue.record("GROUP", f"USER_{n}")
                returned.append(n)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            longest *= 0.95
        except Alarm:
            raised += 1
            longest *= 1.05
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    other = []

    def elsewhere():
        try:
            other.append(queue.record("GROUP", "ELSEWHERE"))
        except OutboxError as error:
            other.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(10)
    say(f"raised {raised}")
    say(f"other {other[0]!r}")
    say(f"returned {len(returned)}")
    for n in returned:
        say(n)
    queue.flush(30)
    queue.close()
"""


@pytest.mark.parametrize(("durability", "times"), [("process", 2000), ("power", 400)])
def test_handler_may_raise_inside_record(per, env, outbox, durability, times):
    """An exception out of a signal handler inside record() leaves the queue usable, for all threads.

    What record() returned for is delivered all the same (invariant 1).
    """
    with Child(RAISING_HANDLER, durability, times, env=env, measured=False) as child:
        assert int(child.expect("raised", timeout=40)) > 50
        assert child.expect("other").startswith("<Receipt")
        count = int(child.expect("returned"))
        assert count > 10
        returned = {f"USER_{child.expect('')}" for _ in range(count)}
        child.succeed(40)
    assert returned <= set(users(per))
    connection = sqlite3.connect(outbox)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_keyboard_interrupt_in_flush(per, env, make_queue):
    """Ctrl-C during a flush ends it at once, and what is pending is kept (invariant 4)."""
    per.go_down()
    script = """
    queue = PerQueue(exit_timeout=0)
    queue.record("GROUP", "USER")
    try:
        say("flushing")
        queue.flush(60)
    except KeyboardInterrupt:
        say("interrupted")
    """
    with Child(script, env=env, measured=False) as child:
        child.expect("flushing")
        child.process.send_signal(2)
        child.expect("interrupted", timeout=5)
        child.succeed(5)
    per.come_back()
    make_queue().flush(10)
    assert users(per) == ["USER"]
