"""What ``record()`` costs, 500 times a second, while the rest of the program does something else.

A thread that waits for the GIL waits for whoever has it: up to ``sys.getswitchinterval()``, 5 ms, each time
that SQLite gives it back. So the tail is that of the busiest other thread, the drain's or the program's own;
the way out of the former is a process of its own that delivers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import _peers
import _rounds
from drain import server

from perqueue import PerQueue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RATE, SECONDS = 500, 3.0
_TOKEN = "token"  # noqa: S105 - the server looks at none
_IN_FLIGHT = 32


@contextlib.contextmanager
def computing() -> Iterator[None]:
    """Have another thread compute in pure Python."""
    stopping = False

    def compute() -> None:
        while not stopping:
            sum(range(1000))

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        yield
    finally:
        stopping = True
        thread.join()


@contextlib.contextmanager
def delivering_elsewhere(path: Path, url: str) -> Iterator[None]:
    """Have another process deliver."""
    command = [sys.executable, "-m", "perqueue", "drain", "--watch", "--outbox", str(path)]
    environment = {**os.environ, "PER_ACTIVITY_TOKEN": _TOKEN, "PER_BASE_URL": url}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)


def measure(latency: float, where: str, busy: bool, folder: Path, part: float) -> _rounds.Metrics:  # noqa: FBT001
    """Record beside a drain that has all that it can do."""
    path = folder / "perqueue.db"
    # More than it delivers meanwhile: it must not run dry.
    backlog = int((80_000 if not latency else 6_000) * part) if where != "nobody" else 0
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(server("--latency", latency))
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        options = {"activity_token": _TOKEN, "activity_type_id": _peers.TYPE, "base_url": url}
        with PerQueue(path, drain=False, **options) as before:  # type: ignore[arg-type]
            for number in range(backlog):
                before.record("BACKLOG", f"USER_{number}")
        here = where == "here"
        queue = PerQueue(path, drain=here, max_in_flight=_IN_FLIGHT, exit_timeout=0, **options)  # type: ignore[arg-type]
        stack.callback(queue.close)
        if where == "elsewhere":
            stack.enter_context(delivering_elsewhere(path, url))
        if backlog:
            _until_delivering(queue, backlog)
        if busy:
            stack.enter_context(computing())
        times = _rounds.paced(
            lambda number: queue.record(_peers.GROUP, f"USER_{number}"), int(RATE * SECONDS * part), rate=RATE
        )
        if backlog and part >= 1 and (left := queue.stats().pending) < _IN_FLIGHT:
            message = f"the backlog ran dry: {left} pending at the end"
            raise RuntimeError(message)
    return _rounds.percentiles(times)


def tuned(folder: Path, part: float) -> _rounds.Metrics:
    """Insert as seldom by hand: what a processor that was asleep adds to every call."""
    with _peers.tuned(folder) as call:
        return _rounds.percentiles(_rounds.paced(call, int(RATE * SECONDS * part), rate=RATE))


def _until_delivering(queue: PerQueue, backlog: int) -> None:
    """Wait for the drain to have found its pace."""
    deadline = time.monotonic() + 10
    while queue.stats().delivered < backlog / 20 and time.monotonic() < deadline:
        time.sleep(0.02)


ALONE = "nothing else happens"
CASES: dict[str, tuple[float, str, bool]] = {
    ALONE: (0.0, "nobody", False),
    "it drains, server at 50 ms, 32 in flight": (0.05, "here", False),
    "it drains, server at 0 ms": (0.0, "here", False),
    "another process drains, server at 50 ms": (0.05, "elsewhere", False),
    "another process drains, server at 0 ms": (0.0, "elsewhere", False),
    "it drains and computes, server at 50 ms": (0.05, "here", True),
    "it computes, another process drains, 50 ms": (0.05, "elsewhere", True),
    "it computes, nobody drains": (0.0, "nobody", True),
}

if __name__ == "__main__":
    group = f"record() {RATE} times a second, while"
    _rounds.main(
        "record_draining",
        "record_draining.py",
        "What recording costs while something else happens.",
        [
            _rounds.Case(
                group=group,
                name="(tuned insert) nothing else happens",
                survives=_peers.KILL,
                run=tuned,
            ),
            *(
                _rounds.Case(
                    group=group,
                    name=name,
                    survives=_peers.KILL,
                    base=name == ALONE,
                    run=functools.partial(measure, *case),
                )
                for name, case in CASES.items()
            ),
        ],
    )
