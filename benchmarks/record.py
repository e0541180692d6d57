"""How much ``record()`` costs beside a bare one-row INSERT, in one run on one machine.

Both write to WAL files in the same directory, turn by turn in rounds, so that a noisy machine is noisy
for both. Run it with ``make bench``; the ratio of the medians is the figure that matters.
"""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from perqueue import PerQueue

if TYPE_CHECKING:
    from collections.abc import Callable

ROUNDS = 7
CALLS = 5_000


def measure(call: Callable[[int], object]) -> list[float]:
    """Return the microseconds that each of ``CALLS`` calls took, sorted."""
    clock = time.perf_counter_ns
    times = []
    for number in range(CALLS):
        began = clock()
        call(number)
        times.append((clock() - began) / 1000)
    return sorted(times)


def main() -> None:
    """Print medians and tails of each round's figures, and the ratio."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        bare = sqlite3.connect(Path(folder, "bare.db"), isolation_level=None)
        bare.execute("PRAGMA page_size = 1024")
        bare.execute("PRAGMA journal_mode = WAL")
        bare.execute("PRAGMA synchronous = NORMAL")
        bare.execute("CREATE TABLE activity (id INTEGER PRIMARY KEY, billing_id, user_id, type, recorded_at)")
        insert = "INSERT INTO activity (billing_id, user_id, type, recorded_at) VALUES (?, ?, ?, ?)"
        queue = PerQueue(Path(folder, "perqueue.db"), activity_type_id="TYPE", drain=False)
        print("µs per call      p50     p99   p99.9")
        for _ in range(ROUNDS):
            row = measure(lambda n: bare.execute(insert, ("GROUP_A", f"USER_{n}", "TYPE", 1_700_000_000_000)))
            ours = measure(lambda n: queue.record("GROUP_A", f"USER_{n}"))
            for name, times in (("bare INSERT", row), ("record()", ours)):
                tail = "".join(f"{times[CALLS * part // 1000]:8.1f}" for part in (500, 990, 999))
                print(f"{name:<12}{tail}")
            ratios.append(ours[CALLS // 2] / row[CALLS // 2])
        queue.close()
        bare.close()
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"ratio of the medians: {statistics.median(ratios):.2f} ({spread} over {ROUNDS} rounds)")


if __name__ == "__main__":
    main()
