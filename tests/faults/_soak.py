"""What the soak is made of: the program under test, what happens to it, and what is measured meanwhile."""

import os
import re
import signal
import statistics
import time
from contextlib import suppress
from pathlib import Path

from perqueue.sandbox import (
    BadToken,
    Drip,
    HalfBody,
    Hang,
    Html,
    Latency,
    RateLimited,
    ResetAfterAccepting,
    ResetBeforeAccepting,
    Status,
)

THREADS = 4
MAX_IN_FLIGHT = 16
CATCHING_UP = 240
"""Seconds for what has piled up, on a machine that may be busy with other things."""
PAGE = os.sysconf("SC_PAGE_SIZE")

PROGRAM = """
    import random
    acks, rate, acknowledge_first = int(sys.argv[1]), float(sys.argv[2]), len(sys.argv) > 4
    queue = PerQueue(
        max_in_flight=16, request_timeout=1.0, drain=sys.argv[3] == "drain",
        retry=RetryPolicy(base=0.1, cap=1.0, retry_after_cap=2.0, activity_cap=2.0),
    )
    stop = threading.Event()
    me = f"{os.getpid()}-{time.time_ns()}"
    counts = {"recorded": 0, "refused": 0}

    def record(user):
        if acknowledge_first:
            os.write(acks, f"{user}\\n".encode())
            time.sleep(0.05)
        try:
            queue.record("GROUP", user)
        except OutboxError:  # a full disk; the program goes on
            counts["refused"] += 1
            return
        counts["recorded"] += 1
        if not acknowledge_first:
            os.write(acks, f"{user}\\n".encode())

    def work(thread):
        n = 0
        while not stop.wait(random.expovariate(rate / 4)):
            n += 1
            record(f"{me}-{thread}-{n}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    say("ready")
    while line := hear():
        if line == "fork":
            if pid := os.fork():
                os.waitpid(pid, 0)
            else:
                record(f"{os.getpid()}-{time.time_ns()}-forked")
                os._exit(0)
        elif line == "rest":
            stop.set()
            for thread in threads:
                thread.join()
        elif line == "flush":
            try:
                queue.flush(240)
            except PerQueueError as error:
                say(f"not flushed: {error}")
                continue
        say(f"done {counts['recorded']} {counts['refused']} {queue.stats().pending}")
    queue.close()
"""


class Sample:
    """What one process holds of the machine, at one moment; read from outside."""

    def __init__(self, pid, wal, accepted=0):
        process = Path(f"/proc/{pid}")
        self.at = time.monotonic()
        self.accepted = accepted
        self.rss = int((process / "statm").read_text().split()[1]) * PAGE
        self.threads = len(list((process / "task").iterdir()))
        self.names = []
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):  # closed in this instant
                self.names.append(re.sub(r"\d+", "N", str(descriptor.readlink())))
        self.sockets = sum(name.startswith("socket:") for name in self.names)
        self.files = len(self.names) - self.sockets
        try:
            self.wal = Path(wal).stat().st_size
        except FileNotFoundError:
            self.wal = 0


def slope(samples):
    """Return by how many bytes the RSS grows in ten minutes: a straight line through all samples."""
    line = statistics.linear_regression([s.at for s in samples], [s.rss for s in samples])
    return line.slope * 600


class Faults:
    """Everything that happens, one thing at a time; each call returns when it is over."""

    def __init__(self, per, program, second, disk, choice):
        self._per = per
        self._program = program
        self._second = second
        self._disk = disk
        self._choice = choice
        self.all = [
            self.away,
            self.bad_token,
            self.errors,
            self.half_answers,
            self.hanging,
            self.resets,
            self.slow,
            self.throttled,
            self.forks,
            self.frozen,
            self.other_process_killed,
        ] + ([self.disk_full] if disk is not None else [])

    def _wait(self, least, most):
        time.sleep(self._choice.uniform(least, most))

    def _during(self, *faults, longest=3.0):
        for fault in faults:
            self._per.set_fault(fault)
            self._wait(0.2, longest / len(faults))
        self._per.clear_faults()
        self._per.release()

    def away(self):
        self._per.go_down()
        self._wait(0.2, 4)
        self._per.come_back()

    def bad_token(self):
        self._during(BadToken())

    def errors(self):
        self._during(Status(500), Html(), Status(503))

    def half_answers(self):
        self._during(HalfBody(), Drip())

    def hanging(self):
        self._during(Hang())

    def resets(self):
        self._during(ResetBeforeAccepting(), ResetAfterAccepting())

    def slow(self):
        self._during(Latency(0.1))

    def throttled(self):
        self._during(RateLimited(1))

    def forks(self):
        for _ in range(3):
            self._program.tell("fork")
            self._program.expect("done")

    def frozen(self):
        os.kill(self._program.pid, signal.SIGSTOP)
        self._wait(0.2, 2)
        os.kill(self._program.pid, signal.SIGCONT)

    def other_process_killed(self):
        self._second.restart()

    def disk_full(self):
        ballast = self._disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1 << 9):
                with suppress(OSError):
                    while True:
                        file.write(b"x" * size)
            self._wait(0.2, 3)
        ballast.unlink()
