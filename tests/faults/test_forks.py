"""Every way in which Python programs fork: parent and children deliver what they recorded, each once."""

import os
import signal
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults._rounds import rounds
from tests.helpers import BECOME, AckPipe, Child, repeats, users


@pytest.fixture
def env(env):
    """Python 3.12 and newer warn of any fork in a program with threads."""
    return {**env, "PYTHONWARNINGS": "ignore::DeprecationWarning"}


FORK_UNDER_LOAD = """
    import itertools
    acks, forks, acknowledge_first = int(sys.argv[1]), int(sys.argv[2]), len(sys.argv) > 3
    queue = PerQueue(max_in_flight=8)
    stop = threading.Event()

    def acknowledge(user):
        os.write(acks, f"{user}\\n".encode())

    def record(user):
        receipt = queue.record("GROUP", user)
        acknowledge(user)
        return receipt

    def work(thread):
        for n in itertools.count():
            if stop.is_set():
                return
            record(f"parent-{thread}-{n}")
            if n % 3 == 0:
                time.sleep(0.04)

    def wait_for(pid):
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "hangs"

    def child(i):
        for n in range(4):
            receipt = record(f"child-{i}-{n}")
        if i % 5 == 0:
            queue.flush(9)
        elif i % 5 == 1:
            assert receipt.wait(9)
        if acknowledge_first:
            acknowledge(f"child-{i}-never")
            os._exit(0)
        if i % 2:
            os._exit(0)
        sys.exit(0)

    record("FIRST").wait(10)  # so it is the parent that is elected, which does not end by _exit()
    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for i in range(forks):
        pid = os.fork()
        if pid == 0:
            child(i)
        children.append(pid)
        if i % 3 == 2 or i == forks - 1:
            for pid in children:
                say(wait_for(pid))
            children.clear()
    stop.set()
    for thread in threads:
        thread.join()
    queue.flush(60)
    queue.close()
"""


def fork_under_load(env, forks, *more):
    """Return how the children ended, and what everybody acknowledged."""
    with AckPipe() as pipe:
        arguments = (FORK_UNDER_LOAD, pipe.writer, forks, *more)
        with Child(*arguments, env=env, pass_fds=[pipe.writer], measured=False) as child:
            codes = []
            while len(codes) < forks:
                codes.append(child.expect("", timeout=30))
                pipe.drain(0)
            assert child.succeed(80) == []
        return codes, set(pipe.acknowledged())


@pytest.mark.timeout(rounds(120, 400))
def test_forks_under_load(per, env, record_property):
    """Forked again and again while 4 threads record, parent and children deliver all, however they end.

    Receipts and flushes work in the children, and no acknowledged activity is lost (invariant 10).
    """
    forks = rounds(30, 100)
    codes, acknowledged = fork_under_load(env, forks)
    assert codes == ["0"] * forks
    assert {f"child-{i}-{n}" for i in range(forks) for n in range(4)} <= acknowledged
    assert acknowledged <= set(users(per))
    twice = repeats(per)
    record_property("duplicates", twice)
    print(f"{len(acknowledged)} acknowledged, {twice} delivered twice over {forks} forks")
    assert twice == 0


def test_checker_sees_a_child_that_loses(per, env):
    """A child that acknowledges what it then does not record is found by the same check."""
    _, acknowledged = fork_under_load(env, 3, "acknowledge first")
    assert acknowledged - set(users(per)) == {f"child-{i}-never" for i in range(3)}


POOLS = """
    import concurrent.futures, multiprocessing, os, sys
    from perqueue import PerQueue

    queue = None

    def work(n):
        global queue
        if queue is None:  # spawn and forkserver: a new interpreter
            queue = PerQueue(drain=False)
        queue.record("GROUP", f"{sys.argv[2]}-{n}")
        return os.getpid()

    if __name__ == "__main__":
        queue = PerQueue()
        queue.record("GROUP", "MAIN").wait(10)
        context = multiprocessing.get_context(sys.argv[1])
        if sys.argv[2] == "Pool":
            with context.Pool(2, maxtasksperchild=7) as pool:  # some end, and others are started meanwhile
                pids = pool.map(work, range(20), chunksize=1)
        else:
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                pids = list(pool.map(work, range(20)))
        assert os.getpid() not in pids
        queue.flush(20)
        queue.close()
"""


@pytest.mark.parametrize("kind", ["Pool", "ProcessPoolExecutor"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_processes(per, env, tmp_path, method, kind):
    """Tasks in a pool of processes record, whichever way its processes start and end."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(POOLS))
    with Child(BECOME, program, method, kind, env=env, isolated=True, measured=False) as child:
        child.succeed(60)
    assert sorted(users(per)) == sorted(["MAIN", *(f"{kind}-{n}" for n in range(20))])


def test_daemon(per, env):
    """A program that becomes a daemon, by two forks and closing all descriptors, delivers as before."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "BEFORE").wait(10)
    speak = os.dup2(1, 200)
    if os.fork():
        os._exit(0)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 200)
    for descriptor in range(3):
        os.open(os.devnull, os.O_RDWR)
    queue.record("GROUP", "DAEMON")
    queue.flush(20)
    queue.close()
    os.write(speak, b"delivered\\n")
    """
    with Child(script, env=env, measured=False) as child:
        child.expect("delivered", timeout=30)
    assert users(per) == ["BEFORE", "DAEMON"]


@pytest.mark.parametrize(
    "start",
    [
        'subprocess.Popen(["sleep", "60"], close_fds=False).pid',
        'subprocess.Popen(["sleep", "60"], close_fds=False, preexec_fn=os.getpid).pid',
        'os.posix_spawnp("sleep", ["sleep", "60"], os.environ)',
    ],
    ids=["Popen", "Popen with preexec_fn", "posix_spawn"],
)
def test_programs_started_meanwhile(per, env, outbox, make_queue, start):
    """A program that was started from the draining one inherits none of its files, and not the drain lock."""
    script = f"""
    import subprocess
    queue = PerQueue()
    queue.record("GROUP", "FIRST").wait(10)
    queue.record("GROUP", "SECOND")
    say({start})
    queue.flush(10)
    say("ready")
    hear()
    """
    with Child(script, env=env, measured=False) as child:
        pid = int(child.expect(""))
        try:
            child.expect("ready")
            inherited = []
            for each in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(FileNotFoundError):  # a program that starts opens and closes files of its own
                    inherited.append(str(each.readlink()))
            assert inherited
            assert [path for path in inherited if str(outbox) in path] == []
            child.kill()
            make_queue(activity_type_id="TYPE").record("GROUP", "THIRD").wait(10)
        finally:
            os.kill(pid, signal.SIGKILL)
    assert users(per) == ["FIRST", "SECOND", "THIRD"]


def test_fork_inside_a_pseudo_terminal(per, env):
    """os.forkpty() is a fork like any other."""
    script = """
    queue = PerQueue()
    queue.record("GROUP", "PARENT").wait(10)
    pid, terminal = os.forkpty()
    if not pid:
        queue.record("GROUP", "CHILD")
        queue.flush(20)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    queue.flush(20)
    """
    with Child(script, env=env, measured=False) as child:
        child.succeed(40)
    assert users(per) == ["PARENT", "CHILD"]
