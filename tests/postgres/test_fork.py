"""Forked processes and an outbox in a database: no connection is shared, none is ended for the other."""

from tests.helpers import Child, repeats

FORKS = """
queue = PerQueue()
queue.record("GROUP", "BEFORE").wait(10)
stop = threading.Event()
recorded = []
def work(name):
    number = 0
    while not stop.is_set():
        queue.record("GROUP", f"{name}_{number}")
        recorded.append(f"{name}_{number}")
        number += 1
        time.sleep(0.001)
threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
for thread in threads:
    thread.start()
backends = {connection.pgconn.backend_pid for connection in [queue._outbox._shared.take()]}
children = []
for child in range(8):
    pid = os.fork()
    if pid == 0:
        try:
            for number in range(5):
                queue.record("GROUP", f"CHILD_{child}_{number}")
            queue.record("GROUP", f"LAST_{child}").wait(20)
            queue.close()
        except BaseException as error:
            say(f"failed {error!r}")
            os._exit(1)
        sys.exit(0) if child % 2 else os._exit(0)
    children.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
stop.set()
for thread in threads:
    thread.join()
queue.flush(30)
say(f"{codes == [0] * 8} {len(recorded)}")
queue.close()
os._exit(0)
"""


def test_children_record_on_connections_of_their_own(per, env):
    """Children of a process with threads that record lose nothing, and end no connection of its."""
    with Child(FORKS, env=env, measured=False) as process:
        well, count = process.expect("", 60).split()
        assert well == "True"
        assert process.wait() == 0
    assert per.unique("GROUP") == 1 + int(count) + 8 * 6
    assert repeats(per) == 0


def test_a_fork_without_hooks_is_told(per, env):
    """A process that was forked in C says what to do instead of using its parent's connection."""
    script = """
    import ctypes
    queue = PerQueue(drain=False)
    queue.record("GROUP", "PARENT")
    pid = ctypes.PyDLL(None).fork()
    if pid == 0:
        try:
            queue.record("GROUP", "CHILD")
        except OutboxError as error:
            say(f"told {error}")
        os._exit(0)
    os.waitpid(pid, 0)
    queue.record("GROUP", "AFTER")
    say(f"pending {queue.stats().pending}")
    queue.close()
    """
    with Child(script, env=env, measured=False) as process:
        assert "after the fork" in process.expect("told")
        assert process.expect("pending") == "2"
