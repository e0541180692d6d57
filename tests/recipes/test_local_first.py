"""One outbox for each host: workers only record, a sidecar beside them delivers, hosts come and go."""

import shutil
import signal
from contextlib import ExitStack
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from perqueue._outbox.look import FileOnlooker
from perqueue.sandbox import Latency
from tests.helpers import Child, environment, repeats, until, users
from tests.postgres.wire import Wire

WORKER = """
    queue = PerQueue()
    say("ready")
    while line := hear():
        for number in range(10):
            queue.record("GROUP", f"{line}_{os.getpid()}_{number}")
            say(f"{line}_{os.getpid()}_{number}")
"""
"""A web worker: each line that it hears is ten requests, of which it acknowledges every one."""
PERQUEUE = """
    import runpy, sys
    sys.argv[0] = "perqueue"
    runpy.run_module("perqueue", run_name="__main__")
"""


class Machine:
    """A host: two workers that only record, without a token; a sidecar that delivers."""

    def __init__(self, stack, outbox, per, url):
        self._stack = stack
        self._env = environment(outbox, per, PER_BASE_URL=url or per.url)
        recording = {name: value for name, value in self._env.items() if name != "PER_ACTIVITY_TOKEN"}
        recording["PERQUEUE_DRAIN"] = "false"
        self.acknowledged = set()
        self.workers = [self._start(WORKER, env=recording) for _ in range(2)]
        for worker in self.workers:
            worker.expect("ready")

    def _start(self, script, *arguments, **options):
        return self._stack.enter_context(Child(script, *arguments, measured=False, **options))

    def sidecar(self, *options):
        """Start `perqueue drain`."""
        return self._start(PERQUEUE, "drain", *options, env=self._env, isolated=True)

    def serve(self, name):
        """Have all workers record at once."""
        for worker in self.workers:
            worker.tell(name)
        for worker in self.workers:
            self.acknowledged |= {name + worker.expect(name) for _ in range(10)}

    def retire(self):
        """End the workers, as when a host is taken out of service."""
        for worker in self.workers:
            worker.kill()


@pytest.fixture
def start(outbox, per):
    """Start a host on an outbox of its own."""
    with ExitStack() as stack:
        yield lambda path=outbox, url=None: Machine(stack, path, per, url)


@pytest.fixture
def line(per):
    """A way to Per that can be cut."""
    wire = Wire(urlsplit(per.url).port)
    yield SimpleNamespace(url=f"http://127.0.0.1:{wire.port}", cut=wire.cut, mend=wire.mend)
    wire.close()


def arrived(per, *machines):
    return set(users(per)) == set().union(*(machine.acknowledged for machine in machines))


def test_workers_go_on_while_the_sidecar_is_killed_and_replaced(per, outbox, start):
    """Workers without a token record while nobody delivers, and the next sidecar delivers it all."""
    machine = start()
    first = machine.sidecar("--watch")
    machine.serve("before")
    until(lambda: arrived(per, machine), "all have arrived")
    until(lambda: FileOnlooker(outbox).look().position.pending == 0, "and that is written down")
    first.kill()
    machine.serve("meanwhile")
    assert len(set(users(per))) == 20
    second = machine.sidecar("--watch")
    machine.serve("after")
    until(lambda: arrived(per, machine), "all have arrived")
    assert len(machine.acknowledged) == 60
    assert repeats(per) == 0
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() == 0


def test_a_sidecar_killed_at_work_costs_no_activity(per, start):
    """Killed with requests in flight, a sidecar loses nothing, and at most those in flight are sent twice."""
    machine = start()
    per.set_fault(Latency(0.2))
    first = machine.sidecar("--watch")
    for name in ("a", "b", "c"):
        machine.serve(name)
    until(lambda: per.accepted > 10, "some have arrived")
    first.kill()
    assert not arrived(per, machine)
    per.clear_faults()
    machine.sidecar("--watch")
    until(lambda: arrived(per, machine), "all have arrived")
    assert repeats(per) <= 32


def test_a_host_without_network_records_on_and_catches_up(per, start, line, tmp_path):
    """A host that is cut off goes on recording, does not hold up others, and delivers when it is back."""
    far = start(tmp_path / "far.db", line.url)
    near = start()
    far.sidecar("--watch")
    near.sidecar("--watch")
    far.serve("before")
    until(lambda: arrived(per, far), "the line carries")
    line.cut()
    far.serve("cut_off")
    near.serve("beside")
    until(lambda: len(set(users(per))) == 40, "the other host delivers")
    assert not any(user.startswith("cut_off") for user in users(per))
    line.mend()
    until(lambda: arrived(per, near, far), "both hosts' activities have arrived", 20)
    assert repeats(per) == 0


def test_a_host_is_retired_with_an_empty_outbox(per, start):
    """After `perqueue drain` has ended with 0 the disk may go: nothing is left on it."""
    machine = start()
    machine.sidecar("--watch").kill()
    machine.serve("last")
    machine.retire()
    assert per.accepted == 0  # what would go with the disk
    [said] = machine.sidecar().succeed()
    assert ", 0 pending" in said
    assert arrived(per, machine)


def test_a_host_that_cannot_deliver_hands_its_file_to_another(per, start, outbox, tmp_path):
    """Retired in an outage, a host says that its disk may not go; its file is drained elsewhere."""
    machine = start()
    per.go_down()
    machine.serve("last")
    machine.retire()
    asked = machine.sidecar("--timeout", "0.5")
    assert asked.wait() == 1
    assert "20" in asked.errors()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for part in outbox.parent.glob(f"{outbox.name}*"):
        shutil.move(part, elsewhere)
    per.come_back()
    other = start(elsewhere / outbox.name)
    other.retire()
    assert other.sidecar().wait() == 0
    assert arrived(per, machine)
    assert repeats(per) == 0


def test_an_outbox_that_loses_its_log_loses_what_is_pending(per, start, outbox, tmp_path):
    """Why the files beside it move, too: what was recorded last may be in the log alone."""
    machine = start()
    machine.serve("last")
    machine.retire()
    moved = tmp_path / "moved.db"
    shutil.copy(outbox, moved)
    other = start(moved)
    other.retire()
    assert other.sidecar().wait() == 0
    assert per.accepted < 20
