"""Forks at any moment: both sides go on recording, and nothing is lost or hangs.

Under load, and in the ways of whole programs: tests/faults/test_forks.py.
"""

import os
import pickle
import signal
import textwrap

import pytest

from perqueue import PerQueue
from perqueue.sandbox import Latency
from tests.helpers import BECOME, PREAMBLE, Child, repeats, users


@pytest.fixture
def env(env):
    """Python 3.12 and newer warn of any fork in a program with threads."""
    return {**env, "PYTHONWARNINGS": "ignore::DeprecationWarning"}


@pytest.mark.parametrize(
    "ending", ["os._exit(0)", "gc.collect()\n            sys.exit(0)"], ids=["_exit", "collected, exit"]
)
def test_end_of_a_child_leaves_the_parents_requests_alone(per, env, ending):
    """A child that ends while the parent waits for answers breaks none of its connections (invariant 10)."""
    script = f"""
    import gc
    queue = PerQueue(max_in_flight=8)
    queue.record("GROUP", "FIRST").wait(10)
    for n in range(20):
        queue.record("GROUP", f"USER_{{n}}")
    for n in range(6):
        pid = os.fork()
        if not pid:
            {ending}
        assert os.waitpid(pid, 0)[1] == 0
    queue.flush(10)
    queue.close()
    """
    per.set_fault(Latency(0.2))
    with Child(script, env=env, measured=False) as child:
        child.succeed(30)
    assert per.requests == 21


def test_child_delivers_when_the_parent_is_gone(per, env):
    """A child that outlives its parent takes over the delivery (invariants 5 and 10)."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "PARENT").wait(10)
    if os.fork():
        os._exit(0)
    queue.record("GROUP", "CHILD")
    queue.flush(10)
    say("flushed")
    """
    with Child(script, env=env, measured=False) as child:
        child.expect("flushed")
    assert users(per) == ["PARENT", "CHILD"]


def test_grandchildren(per, env):
    """A fork in a forked child works like the first."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "0")
    for generation in range(1, 5):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            break
        queue.record("GROUP", str(generation))
    queue.flush(10)
    """
    with Child(script, env=env, measured=False) as child:
        child.succeed(30)
    assert sorted(users(per)) == ["0", "1", "2", "3", "4"]


def test_closed_and_dropped_queues_do_not_mind_a_fork(per, env):
    """A fork after close(), or with an asyncio loop running, disturbs nobody."""
    script = """
    import asyncio
    closed = PerQueue()
    closed.record("GROUP", "CLOSED")
    closed.flush(10)
    closed.close()

    async def main():
        queue = PerQueue()
        await queue.record("GROUP", "BEFORE")
        pid = os.fork()
        if not pid:
            queue.record("GROUP", "IN_THE_CHILD")
            os._exit(0)
        await queue.record("GROUP", "AFTER")
        assert os.waitpid(pid, 0)[1] == 0
        await queue.aflush(10)
        await queue.aclose()

    asyncio.run(main())
    """
    with Child(script, env=env, measured=False) as child:
        child.succeed(20)
    assert sorted(users(per)) == ["AFTER", "BEFORE", "CLOSED", "IN_THE_CHILD"]


def test_record_in_somebody_elses_fork_hook(per, env):
    """What a record() in a hook between ours and the fork opens, the child does not use (invariant 10)."""
    script = """
    import os
    queue = None
    def hook():
        if queue is not None:
            queue.record("GROUP", "HOOK")
    os.register_at_fork(before=hook)  # registered first, so called last
    """
    script = (
        textwrap.dedent(script)
        + PREAMBLE
        + textwrap.dedent(
            """
        queue = PerQueue(durability=sys.argv[1])
        for n in range(5):
            queue.record("GROUP", f"parent-{n}")
            pid = os.fork()
            if not pid:
                for k in range(20):
                    queue.record("GROUP", f"child-{n}-{k}")
                sys.exit(0)
            for k in range(20):
                queue.record("GROUP", f"parent-{n}-{k}")
            assert os.waitpid(pid, 0)[1] == 0
        queue.flush(20)
        """
        )
    )
    with Child(script, "process", env=env, isolated=True, measured=False) as child:
        child.succeed(30)
    with Child(script, "power", env=env, isolated=True, measured=False) as child:
        child.succeed(30)
    received = users(per)
    expected = [f"{side}-{n}-{k}" for side in ("parent", "child") for n in range(5) for k in range(20)]
    assert sorted(user for user in received if user.count("-") == 2) == sorted(expected * 2)
    assert received.count("HOOK") == 10


C_FORK = """
    import _imp, ctypes
    # Looked up before: in a child the linker's own lock may be a thread's that is not there.
    fork, after_fork_in_child = ctypes.PyDLL(None).fork, ctypes.pythonapi.PyOS_AfterFork_Child
    queue = PerQueue(exit_timeout=1.0)
    queue.record("GROUP", "BEFORE").wait(10)
    stop = threading.Event()

    def work(thread):
        n = 0
        while not stop.is_set():
            queue.record("GROUP", f"{thread}-{n}")
            n += 1
            time.sleep(0.005)

    threads = [threading.Thread(target=work, args=(thread,), daemon=True) for thread in range(4)]
    for thread in threads:
        thread.start()
    for i in range(10):
        time.sleep(0.02)
        _imp.acquire_lock()
        pid = fork()  # as uWSGI forks: without Python's hooks before
        if pid:
            _imp.release_lock()
        else:
            after_fork_in_child()  # without it CPython's own locks hang sometimes
            for attempt in (lambda: queue.record("GROUP", "CHILD"), queue.stats, queue.flush):
                began = time.monotonic()
                try:
                    attempt()
                except OutboxError as error:
                    say("lazy-apps" in str(error) or str(error))
                except BaseException as error:
                    say(repr(error))
                else:
                    say("worked")
                if time.monotonic() - began > 3:
                    say("slow")
            say("end")
            if sys.argv[1] == "close":
                queue.close()
            if sys.argv[1] == "exit":
                sys.exit(0)
            os._exit(0)
        deadline = time.monotonic() + 10
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                say("hangs")
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    queue.record("GROUP", "AFTER")
    queue.flush(20)
    queue.close()
    """


@pytest.mark.parametrize("ending", ["close", "exit", "_exit"])
def test_fork_without_hooks_is_noticed(per, env, ending):
    """In a child of a fork in C, record() raises OutboxError with the remedy, and nothing hangs.

    The parent, under load, does not notice (invariant 10).
    """
    with Child(C_FORK, ending, env=env, measured=False) as child:
        for _ in range(10):
            assert [child.expect("", timeout=20) for _ in range(4)] == ["True", "True", "True", "end"]
        assert child.succeed(30) == []
    received = users(per)
    assert {"BEFORE", "AFTER"} <= set(received)
    assert "CHILD" not in received
    assert repeats(per) == 0


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(per, env, tmp_path, method):
    """Processes of multiprocessing record into the same outbox, whichever way they are started."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import multiprocessing, os, sys
            from perqueue import PerQueue

            queue = None

            def work(name):
                global queue
                if queue is None:  # spawn and forkserver: a new interpreter
                    queue = PerQueue(drain=False)
                for n in range(10):
                    queue.record("GROUP", f"{name}-{n}")

            if __name__ == "__main__":
                queue = PerQueue()
                queue.record("GROUP", "MAIN")
                context = multiprocessing.get_context(sys.argv[1])
                processes = [context.Process(target=work, args=(name,)) for name in "ABC"]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join(20)
                    assert process.exitcode == 0, process.exitcode
                queue.flush(20)
                queue.close()
            """
        )
    )
    with Child(BECOME, program, method, env=env, isolated=True, measured=False) as child:
        child.succeed(30)
    assert sorted(users(per)) == sorted(["MAIN", *(f"{name}-{n}" for name in "ABC" for n in range(10))])


def test_queue_cannot_be_pickled(make_queue):
    """Pickling a queue, which would copy its token, is refused with what to do instead."""
    queue = make_queue()
    with pytest.raises(TypeError, match="make one in each process"):
        pickle.dumps(queue)


def test_inherited_files_do_not_keep_the_drain_lock(per, env, outbox, options):
    """A forked child that does nothing, and lives on, keeps no other process from draining (invariant 5)."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "FIRST").wait(10)
    pid = os.fork()
    if not pid:
        time.sleep(30)
        os._exit(0)
    say(pid)
    hear()
    os.kill(os.getpid(), signal.SIGKILL)
    """
    with Child(script, env=env, measured=False) as child:
        orphan = int(child.expect(""))
        try:
            child.tell("die")
            child.wait()
            with PerQueue(outbox, **options) as queue:
                queue.record("GROUP", "SECOND").wait(5)
        finally:
            os.kill(orphan, signal.SIGKILL)
    assert users(per) == ["FIRST", "SECOND"]


FORK_BETWEEN_ANY_TWO = """
    from pathlib import Path
    from perqueue._outbox import SQLiteOutbox
    outbox = SQLiteOutbox(Path(os.environ["PERQUEUE_OUTBOX"]), None)
    for n in range(20):
        outbox.append("GROUP", f"parent-{n}", "TYPE", n)
        if not (pid := os.fork()):
            code = 1
            try:
                outbox.append("GROUP", f"child-{n}", "TYPE", n)
                outbox.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    say(f"pending {outbox.position().pending}")
    outbox.close()
"""


def test_outbox_survives_a_fork_in_the_middle_of_many(env):
    """A fork between any two uses closes the connection before, and opens it again on both sides."""
    with Child(FORK_BETWEEN_ANY_TWO, env=env, measured=False) as child:
        assert child.expect("pending") == "40"
        child.succeed()


DELIVER_AND_NAME_IMPORTS = """
    import httpx
    more = {"proxy": os.environ["PROXY"]} if sys.argv[1] == "proxy" else {}
    if sys.argv[1] == "https":
        more["base_url"] = "HTTPS://127.0.0.1:9"  # nobody answers: what matters is what is imported
    if sys.argv[1] == "transport":
        more["transport"] = httpx.AsyncHTTPTransport(trust_env=False)
    queue = PerQueue(**more)
    before = set(sys.modules)
    queue.record("GROUP", "USER")
    try:
        queue.flush(1)
    except PerQueueError:  # whatever comes of it
        pass
    say(" ".join(["imported", *sorted(set(sys.modules) - before)]))
    queue.close()
"""


@pytest.mark.parametrize("mode", ["http", "https", "transport", "proxy"])
def test_the_drain_imports_nothing(per, env, mode):
    """All that delivery needs is imported by the constructor: a child forked during an import would hang."""
    with Child(DELIVER_AND_NAME_IMPORTS, mode, env=env | {"PROXY": per.url}) as child:
        assert child.expect("imported").split() == []
        child.succeed()
