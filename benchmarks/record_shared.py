"""What ``record()`` costs when several record into one outbox, and when each must survive a power cut.

*Paced*: four threads, and four processes, each 500 times a second. *Power*: ``durability="power"`` beside one
append and fdatasync on the same disk; several threads share a sync.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import _peers
import _rounds
from _frame import HERE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Measure = Callable[[_peers.Call], list[int]]

RATE, SECONDS, PARTIES = 500, 3.0, 4
POWER_CALLS = 1_500
_SEVERAL = 8


def in_threads(number: int, measure: Measure, call: _peers.Call) -> list[int]:
    """Return what the calls of several threads took."""
    times: list[list[int]] = []
    threads = [threading.Thread(target=lambda: times.append(measure(call))) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [each for of_thread in times for each in of_thread]


def paced(part: float) -> Measure:
    """Return the measurement of one of several that record now and then."""
    return functools.partial(_rounds.paced, calls=int(RATE * SECONDS * part), rate=RATE)


def threads(peer: _peers.Peer, folder: Path, part: float) -> _rounds.Metrics:
    """Record from several threads over one connection."""
    with peer(folder) as call:
        return _rounds.percentiles(in_threads(PARTIES, paced(part), call))


def processes(name: str, folder: Path, part: float) -> _rounds.Metrics:
    """Record from several processes into one file."""
    with _peers.SHARED[name](folder):  # makes the file, and keeps it open
        command = [sys.executable, str(HERE / "record_shared.py"), "--party", name, str(folder), str(part)]
        parties = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(PARTIES)]
        times = [each for party in parties for each in json.loads(party.communicate()[0])]
    return _rounds.percentiles(times)


def party(name: str, folder: Path, part: float) -> None:
    """Record as one of several processes, and print what each call took."""
    with _peers.SHARED[name](folder) as call:
        print(json.dumps(paced(part)(call)))


def power(peer: _peers.Peer, number: int, folder: Path, part: float) -> _rounds.Metrics:
    """Record from some threads, each as fast as it can."""
    calls = int(POWER_CALLS * part)
    with peer(folder) as call:
        measure = functools.partial(_rounds.timed, calls=calls, seconds=3.0, warm_up=5)
        began = time.perf_counter()
        times = in_threads(number, measure, call)
        seconds = time.perf_counter() - began
    return {**_rounds.percentiles(times), "calls/s": len(times) / seconds}


def cases() -> list[_rounds.Case]:
    """Return all lines of the tables."""
    kill, cut = _peers.KILL, _peers.POWER
    found = []
    for name, peer in _peers.SHARED.items():
        for parties, run in (
            ("threads", functools.partial(threads, peer)),
            ("processes", functools.partial(processes, name)),
        ):
            group = f"{PARTIES} {parties}, {RATE}/s each"
            base = name == _peers.BUSY
            found.append(_rounds.Case(group=group, name=name, survives=kill, base=base, run=run))
    durable = functools.partial(_peers.perqueue, durability="power")
    full = functools.partial(_peers.bare, synchronous="FULL")
    for name, peer, number in (
        ("append and fdatasync", _peers.fdatasync, 1),
        ("bare insert, WAL + FULL", full, 1),
        ("bare insert, WAL + FULL, 8 threads", full, _SEVERAL),
        ("perqueue record()", durable, 1),
        ("perqueue record(), 8 threads", durable, _SEVERAL),
    ):
        run = functools.partial(power, peer, number)
        base = peer is _peers.fdatasync
        found.append(_rounds.Case(group='durability="power"', name=name, survives=cut, base=base, run=run))
    return sorted(found, key=lambda case: case.group)


if __name__ == "__main__":
    from pathlib import Path

    if sys.argv[1:2] == ["--party"]:
        party(sys.argv[2], Path(sys.argv[3]), float(sys.argv[4]))
    else:
        _rounds.main("record_shared", "record_shared.py", "What recording costs when several do.", cases())
