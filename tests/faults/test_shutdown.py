"""The end of the interpreter: threads that outlive the main one, handlers that come late, finalizers.

Python 3.12 and newer start no thread any more then.
"""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.helpers import PREAMBLE, Child, users

THREE = {"USER_0", "USER_1", "USER_2"}

THREAD_RECORDS_FIRST = """
    queue = PerQueue(exit_timeout=5.0)
    def work():
        threading.main_thread().join()
        for n in range(3):
            queue.record("GROUP", f"USER_{n}")
    threading.Thread(target=work).start()
"""

THREAD_WAITS = """
    queue = PerQueue(exit_timeout=5.0)
    def work():
        threading.main_thread().join()
        for n in range(2):
            queue.record("GROUP", f"USER_{n}").wait(10)
        queue.record("GROUP", "USER_2")
        queue.flush(10)
        say("flushed")
    threading.Thread(target=work).start()
"""

THREAD_MAKES_THE_QUEUE = """
    def work():
        threading.main_thread().join()
        queue = PerQueue(exit_timeout=5.0)
        for n in range(3):
            queue.record("GROUP", f"USER_{n}")
    threading.Thread(target=work).start()
"""

POOL_RECORDS = """
    from concurrent.futures import thread
    queue = PerQueue(exit_timeout=5.0)
    def work(n):
        while not thread._shutdown:  # set when the main thread has ended, and the pool is joined
            time.sleep(0.005)
        queue.record("GROUP", f"USER_{n}")
    pool = thread.ThreadPoolExecutor(3)
    for n in range(3):
        pool.submit(work, n)
"""

REPORT_AT_EXIT = """
    import atexit
    queue = PerQueue(exit_timeout=5.0)
    def last():
        for n in range(3):
            queue.record("GROUP", f"USER_{n}")
        queue.flush(10)
        try:
            assert queue.get_report("2018-12-01T00:00:00Z").unique("GROUP") == 3
        except PerAPIError as error:
            assert "shutting down" in str(error), error
    atexit.register(last)
"""

FINALIZER_RECORDS = """
    queue = PerQueue(exit_timeout=5.0)
    for n in range(3):
        queue.record("GROUP", f"USER_{n}")
    class Late:
        def __del__(self, queue=queue, closed=QueueClosed, say=os.write):
            try:
                queue.record("GROUP", "LATE")
            except closed:
                say(1, b"closed\\n")
    late = Late()
    late.myself = late  # collected with the interpreter's modules
"""

SCRIPTS = {
    "a thread that outlives the main one records first": THREAD_RECORDS_FIRST,
    "a thread that outlives the main one waits": THREAD_WAITS,
    "a thread that outlives the main one makes the queue": THREAD_MAKES_THE_QUEUE,
    "a pool of threads records": POOL_RECORDS,
    "an exit handler asks for a report": REPORT_AT_EXIT,
    "a finalizer records": FINALIZER_RECORDS,
}
SAYS = {THREAD_WAITS: ["flushed"], FINALIZER_RECORDS: ["closed"]}
OTHER_VERSIONS = [f"3.{minor}" for minor in range(11, 15) if (3, minor) != sys.version_info[:2]]
RUN = "import os, sys\nos.execv(sys.argv[1], [sys.argv[1], '-c', sys.argv[2]])"


@pytest.fixture
def env(env, per):
    """What a child needs for its ``PerQueue()``, and to ask for reports."""
    return {**env, "PER_REPORTING_TOKEN": per.reporting_token}


def run(python, script, env):
    """Run a program that must end by itself, in silence; return what it said on purpose."""
    code = PREAMBLE + textwrap.dedent(script)
    with Child(RUN, python, code, env=env, isolated=True, measured=False) as child:
        return child.succeed(30)


def pythons():
    """Return this Python, and every other that is installed with what perqueue needs."""
    found = [sys.executable]
    for version in OTHER_VERSIONS:
        python = shutil.which(f"python{version}")
        needed = [python, "-c", "import filelock, h11, httpx, perqueue, sniffio, sqlite_utils, tenacity"]
        if python and not subprocess.run(needed, check=False, capture_output=True).returncode:
            found.append(python)
    return found


@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_what_is_recorded_while_the_interpreter_ends_is_kept(per, env, make_queue, script, python):
    """What record() returned for while the interpreter ends is delivered then, or by the next start.

    Nothing hangs, no thread's refusal to start gets out, and nothing is written to stderr.
    """
    assert run(python, script, env) == SAYS.get(script, [])
    make_queue(activity_type_id="TYPE").flush(10)
    assert set(users(per)) == THREE


@pytest.mark.parametrize("attempt", ['queue.record("GROUP", "LATE")', "queue.flush()", "queue.stats()"])
def test_exit_handlers_that_come_last_are_told(per, env, attempt):
    """An exit handler that is called after perqueue's own meets QueueClosed: nothing is lost in silence."""
    script = f"""
    import atexit, os
    def last():
        try:
            {attempt}
        except QueueClosed:
            os.write(1, b"closed\\n")
    atexit.register(last)
    """
    code = textwrap.dedent(script) + PREAMBLE + 'queue = PerQueue()\nqueue.record("GROUP", "FIRST")\n'
    with Child(code, env=env, isolated=True, measured=False) as child:
        assert child.succeed() == ["closed"]
    assert users(per) == ["FIRST"]
