"""Threads that gevent or eventlet have made greenlets: perqueue delivers, or says clearly who must."""

import textwrap

import pytest

from perqueue.sandbox import Latency
from tests.faults._needs import needs
from tests.helpers import PREAMBLE, Child, repeats, users

GEVENT = """
import gevent.monkey
gevent.monkey.patch_all()
"""


def in_greenlets(script):
    return GEVENT + PREAMBLE + "import gevent\n" + textwrap.dedent(script)


def test_gevent(per, env, outbox):
    """With everything patched by gevent, greenlets record, wait, flush and ask for reports.

    Each activity is delivered once, and what is recorded last is delivered at exit.
    """
    needs("gevent")
    script = """
    queue, another = PerQueue(exit_timeout=5.0), PerQueue(f"{sys.argv[1]}-another")

    def work(name):
        for n in range(20):
            queue.record("GROUP", f"{name}-{n}")
            another.record("GROUP", f"another-{name}-{n}")
            gevent.sleep(0.001)
        assert queue.record("GROUP", f"{name}-waited").wait(20)
        queue.flush(20)
        assert queue.get_report("2018-12-01T00:00:00Z").unique("GROUP") > 20

    gevent.joinall([gevent.spawn(work, name) for name in "ABCDE"], raise_error=True)
    another.flush(20)
    another.close()
    queue.record("GROUP", "LAST")
    """
    env["PER_BASE_URL"] = per.url.replace("127.0.0.1", "localhost")
    env["PER_REPORTING_TOKEN"] = per.reporting_token
    with Child(in_greenlets(script), outbox, env=env, isolated=True, measured=False) as child:
        child.succeed(40)
    recorded = {f"{name}-{n}" for name in "ABCDE" for n in range(20)}
    wanted = recorded | {f"another-{user}" for user in recorded} | {f"{name}-waited" for name in "ABCDE"}
    assert set(users(per)) == wanted | {"LAST"}
    assert repeats(per) == 0


@pytest.mark.parametrize(
    "wait", ["queue.flush(10)", "receipt.wait(10)", "queue.close()", "queue.get_report()"]
)
def test_who_waits_under_gevent_holds_up_nobody(per, env, wait):
    """While one greenlet waits for Per, the others go on."""
    needs("gevent")
    script = f"""
    queue = PerQueue()
    queue.record("GROUP", "FIRST").wait(10)
    say("ready")
    hear()
    ticks = 0
    def tick():
        global ticks
        while True:
            ticks += 1
            gevent.sleep(0.01)
    receipt = queue.record("GROUP", "USER")
    while not queue.stats().in_flight:
        gevent.sleep(0.001)
    gevent.spawn(tick)
    {wait}
    say(ticks)
    """
    env["PER_REPORTING_TOKEN"] = per.reporting_token
    with Child(in_greenlets(script), env=env, isolated=True, measured=False) as child:
        child.expect("ready")
        per.set_fault(Latency(0.5), endpoint="both")
        child.tell("go")
        assert int(child.expect("")) > 5
        child.succeed()


def test_gevent_and_forks(per, env):
    """A fork under gevent works like any other, and queues that were closed leave no descriptors."""
    needs("gevent")
    script = """
    queue = PerQueue()
    queue.record("GROUP", "PARENT").wait(10)
    for n in range(5):
        pid = os.fork()
        if not pid:
            queue.record("GROUP", f"CHILD-{n}")
            queue.flush(20)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    queue.close()
    before = len(os.listdir("/proc/self/fd"))
    for n in range(10):
        queue = PerQueue()
        queue.record("GROUP", f"AGAIN-{n}").wait(10)
        queue.close()
    assert len(os.listdir("/proc/self/fd")) < before + 10
    """
    with Child(in_greenlets(script), env=env, isolated=True, measured=False) as child:
        child.succeed(40)
    children, again = {f"CHILD-{n}" for n in range(5)}, {f"AGAIN-{n}" for n in range(10)}
    assert set(users(per)) == {"PARENT"} | children | again
    assert repeats(per) == 0


def test_eventlet_is_told_who_delivers(per, env, outbox):
    """With threads patched by eventlet a queue records, and says once, clearly, that another must deliver.

    `perqueue drain` then does, and a flush() that waits returns.
    """
    needs("eventlet")
    script = """
    import logging
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    queue = PerQueue()
    threads = [threading.Thread(target=queue.record, args=("GROUP", f"USER_{n}")) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for attempt in (lambda: queue.flush(0.3), lambda: queue.get_report()):
        try:
            attempt()
        except PerQueueError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
    print("ready", flush=True)
    queue.flush(30)
    queue.close()
    """
    eventlet = "import eventlet\neventlet.monkey_patch()\n"
    environment = {**env, "PYTHONWARNINGS": "ignore", "PER_REPORTING_TOKEN": per.reporting_token}
    code = eventlet + PREAMBLE + textwrap.dedent(script)
    with Child(code, env=environment, isolated=True, measured=False) as child:
        logged = child.expect("")
        assert "eventlet" in logged
        assert "perqueue drain" in logged
        assert "perqueue drain" in child.expect("FlushTimeout")
        assert "eventlet" in child.expect("PerAPIError")
        child.expect("ready")
        assert users(per) == []
        drain = "from perqueue.cli import main\nmain(['drain'])"
        with Child(drain, env=env, isolated=True) as drainer:
            drainer.wait(20)
            assert drainer.process.returncode == 0, drainer.errors()
        assert child.wait(20) == 0, child.errors()
    assert sorted(users(per)) == sorted(f"USER_{n}" for n in range(20))
