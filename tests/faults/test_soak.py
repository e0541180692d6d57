"""Minutes of steady load under random faults: nothing is lost, and nothing grows.

`PERQUEUE_SOAK_SECONDS` sets how long (10, or 600 with `make soak`), `PERQUEUE_SOAK_SEED` what happens.
"""

import os
import random
import subprocess
import threading
import time
from collections import Counter

import pytest

from tests.faults._rounds import SOAK, rounds
from tests.faults._soak import CATCHING_UP, MAX_IN_FLIGHT, PROGRAM, THREADS, Faults, Sample, slope
from tests.helpers import AckPipe, Child, environment, repeats, users

SECONDS = float(os.environ.get("PERQUEUE_SOAK_SECONDS", rounds(10, 600)))
SEED = int(os.environ.get("PERQUEUE_SOAK_SEED", random.randrange(10**6)))
RATE = 200
WAL_MOST = 8 << 20
GROWTH_MOST = 1 << 20
"""Bytes of RSS in ten minutes."""


@pytest.fixture
def disk(tmp_path):
    """A disk that can be filled; None where only root could mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = "size=256m"
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", size, "none", folder], capture_output=True, check=False
        ).returncode
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


class SecondProcess:
    """Another process on the same outbox, which only records, and is killed now and then."""

    def __init__(self, start):
        self._start = start
        self._child = start()

    def restart(self):
        self.kill()
        self._child = self._start()

    def kill(self):
        self._child.__exit__(None, None, None)


class Watch:
    """Samples a process every second, in a thread, and empties the pipe of acknowledgements."""

    def __init__(self, per, pid, wal, pipe):
        self._per = per
        self._arguments = pid, wal
        self._pipe = pipe
        self._stop = False
        self.samples = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop:
            self.samples.append(Sample(*self._arguments, self._per.accepted))
            self._pipe.drain(1.0)

    def stop(self):
        self._stop = True
        self._thread.join()


def show(samples, happened, figures):
    """Print a table: a line for each tenth of the time, what happened, and what came of it."""
    print(f"seed {SEED}, {SECONDS:g} s, {len(samples)} samples")
    print(" time    RSS/kB threads files sockets  WAL/kB  accepted")
    for sample in samples[:: max(1, len(samples) // 10)]:
        print(
            f"{sample.at - samples[0].at:4.0f} s {sample.rss >> 10:9} {sample.threads:7} {sample.files:5}"
            f" {sample.sockets:7} {sample.wal >> 10:7} {sample.accepted:9}"
        )
    print(", ".join(f"{name} {happened.count(name)}" for name in sorted(set(happened))))
    print(", ".join(f"{name}: {value}" for name, value in figures.items()))


@pytest.mark.timeout(SECONDS + CATCHING_UP + 120)
def test_soak(per, tmp_path, disk, record_property):
    """Under steady load and random faults nothing is lost, and memory, descriptors and WAL do not grow."""
    outbox = (disk or tmp_path) / "outbox.db"
    env = environment(outbox, per, PYTHONWARNINGS="ignore::DeprecationWarning")
    choice = random.Random(SEED)
    with AckPipe() as pipe:

        def start(rate, drain):
            arguments = (pipe.writer, rate, drain)
            child = Child(PROGRAM, *arguments, env=env, pass_fds=[pipe.writer], measured=False)
            child.expect("ready")
            return child

        with start(RATE, "drain") as program:
            second = SecondProcess(lambda: start(RATE / 10, "record"))
            watch = Watch(per, program.pid, f"{outbox}-wal", pipe)
            try:
                per.wait_for(50)
                before = at_rest(program.pid, outbox)
                happened = bear(Faults(per, program, second, disk, choice), choice)
                second.kill()
                program.tell("rest")
                _, refused, _ = program.expect("done").split()
                program.tell("flush")
                assert program.expect("done", timeout=CATCHING_UP + 20).split()[2] == "0"
                after = at_rest(program.pid, outbox)
            finally:
                watch.stop()
                second.kill()
            program.tell("")
            assert program.succeed(15) == []
        acknowledged = pipe.acknowledged()
    lost = set(acknowledged) - set(users(per))
    steady = [sample for sample in watch.samples if sample.at - watch.samples[0].at > SECONDS / 3]
    figures = {
        "acknowledged": len(acknowledged),
        "refused": int(refused),
        "lost": len(lost),
        "sent twice": repeats(per),
        "RSS growth in 10 min": f"{slope(steady) / 1024:.0f} kB",
        "most WAL": f"{max(sample.wal for sample in watch.samples) >> 10} kB",
        "most files": max(sample.files for sample in watch.samples),
        "most sockets": max(sample.sockets for sample in watch.samples),
    }
    show(watch.samples, happened, figures)
    record_property("figures", figures)
    assert len(acknowledged) > RATE * SECONDS / 4
    assert lost == set()
    assert left_open(before, after) == []
    assert after.threads == before.threads - THREADS
    assert max(sample.sockets for sample in watch.samples) <= MAX_IN_FLIGHT + 4  # and those of the event loop
    assert max(sample.wal for sample in watch.samples) < WAL_MOST
    if SOAK:
        assert slope(steady) < GROWTH_MOST


def test_soak_sees_a_loss(per, env, make_queue):
    """A program that acknowledges before record() loses some when killed, and the same check finds it."""
    with AckPipe() as pipe:
        for _ in range(3):
            arguments = (pipe.writer, 4 * RATE, "record", "acknowledge first")
            with Child(PROGRAM, *arguments, env=env, pass_fds=[pipe.writer], measured=False) as program:
                program.expect("ready")
                pipe.drain(0.3)
        acknowledged = pipe.acknowledged()
    make_queue(activity_type_id="TYPE").flush(30)
    assert set(acknowledged) - set(users(per))


def at_rest(pid, outbox):
    """Return the sample with the fewest files of a second: a checkpoint opens some for milliseconds."""
    samples = []
    for _ in range(20):
        samples.append(Sample(pid, f"{outbox}-wal"))
        time.sleep(0.05)
    return min(samples, key=lambda sample: sample.files)


def left_open(before, after):
    """Return the files that only the later sample holds."""
    more = Counter(after.names) - Counter(before.names)
    more.pop("socket:[N]", None)  # connections are kept alive, up to a number
    # SQLite keeps one descriptor of a connection that was closed while another holds locks, and reuses it.
    more -= Counter(name for name in more if name.endswith("/outbox.db"))
    return sorted(more.elements())


def bear(faults, choice):
    """Let every fault happen once, then random ones until the time is up; return their names."""
    deadline = time.monotonic() + SECONDS
    happened = []
    coming = choice.sample(faults.all, len(faults.all))
    while time.monotonic() < deadline:
        fault = coming.pop() if coming else choice.choice(faults.all)
        fault()
        happened.append(fault.__name__)
        time.sleep(choice.uniform(0.2, 2.0))
    return happened
