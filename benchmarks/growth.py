"""What a backlog and a long history cost: the same operations on an empty and on grown outboxes, in turns.

Run it with ``make bench``. The outboxes are made first, which takes minutes and gigabytes; with ``--folder``
they are kept there, and used again. The ratios to the empty outbox are the figures that matter.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _frame
import _grown
from _frame import Row
from _grown import GROUP, KIND, USERS

from perqueue import OutboxFull, PerQueue
from perqueue._outbox import SQLiteOutbox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BATCH = 64
PRUNED = 50
"""Activities in a step of pruning, as the drain asks for."""
PAUSE = 0.005
"""Seconds between two steps."""
OPERATIONS = ("record()", "claim, each", "settle, each", "stats()", "a full outbox's refusal", "opening, ms")
_TURN = 500
"""Calls of one outbox, before it is another one's turn: a noisy machine is noisy for all."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    pending: int
    settled: int
    rounds: int
    turns: int
    prunes: int
    beside: int


FULL = Size(10_000_000, 30_000_000, 5, 20, 200, 4000)
SMOKE = Size(20_000, 20_000, 1, 1, 20, 200)


class Grown:
    """One outbox, and the times that were measured with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.queue = self._open()
        self.outbox = self.queue._outbox  # noqa: SLF001 - what the drain calls
        self.cursor = self.outbox.position().drained_through
        self.times: dict[str, list[float]] = defaultdict(list)

    def _open(self, most: int = 10**9) -> PerQueue:
        return PerQueue(
            self.path, activity_type_id=KIND, base_url=_grown.ORIGIN, drain=False, max_pending=most
        )

    def _timed(self, operation: str, call: Callable[[], Any], each: int = 1) -> Any:
        began = time.perf_counter_ns()
        result = call()
        self.times[operation].append((time.perf_counter_ns() - began) / 1000 / each)
        return result

    def turn(self) -> None:
        """Record some, and deliver as many."""
        for number in range(_TURN):
            user = USERS[number]
            self._timed("record()", lambda user=user: self.queue.record(GROUP, user))  # type: ignore[misc]
        for _ in range(_TURN // BATCH):
            claimed = self._timed("claim, each", lambda: self.outbox.claim(self.cursor, BATCH), BATCH)
            self.cursor = claimed[-1].id
            batch = [_grown.accepted(activity) for activity in claimed]
            self._timed(
                "settle, each",
                lambda batch=batch: self.outbox.settle(  # type: ignore[misc]
                    batch, drained_through=self.cursor, refusals=(0, None)
                ),
                BATCH,
            )
        for _ in range(20):
            self._timed("stats()", self.queue.stats)

    def open_again(self) -> None:
        """Open it a second time, and refuse a record() because it is full."""
        began = time.perf_counter()
        second = self._open(1)
        self.times["opening, ms"].append((time.perf_counter() - began) * 1000)
        with closing(second):
            for _ in range(50):
                self._timed("a full outbox's refusal", lambda: _refused(second))

    def round(self) -> dict[str, tuple[float, float]]:
        """Return median and 99th percentile of each operation since the last call."""
        result = {}
        for operation, times in self.times.items():
            times.sort()
            result[operation] = (statistics.median(times), times[len(times) * 99 // 100])
        self.times.clear()
        return result


def _refused(queue: PerQueue) -> None:
    try:
        queue.record(GROUP, USERS[0])
    except OutboxFull:
        return
    message = "it was not full"
    raise AssertionError(message)


def operations(paths: dict[str, Path], size: Size) -> list[Row]:
    """Measure what each operation costs on each outbox."""
    grown = {name: Grown(path) for name, path in paths.items()}
    rows = {
        (name, op): Row(group=op, case=name, unit="ms" if op.endswith("ms") else "µs")
        for op in OPERATIONS
        for name in grown
    }
    chance = random.Random(1)  # noqa: S311 - the order of turns
    for _ in range(size.rounds):
        for _ in range(size.turns):
            for each in chance.sample([*grown.values()], len(grown)):
                each.turn()
                each.open_again()
        for name, each in grown.items():
            for operation, (median, high) in each.round().items():
                metrics = rows[name, operation].metrics
                metrics.setdefault("p50", []).append(median)
                metrics.setdefault("p99", []).append(high)
    for each in grown.values():
        each.queue.close()
    for (_, operation), row in rows.items():
        for metric in ("p50", "p99"):
            base = rows["empty", operation].metrics[metric]
            row.metrics[f"ratio {metric}"] = _frame.ratios(row.metrics[metric], base)
    return [*rows.values()]


def _file(queue: PerQueue) -> SQLiteOutbox:
    outbox = queue._outbox  # noqa: SLF001 - what the drain calls
    assert isinstance(outbox, SQLiteOutbox)
    return outbox


def pruning(path: Path, size: Size) -> list[Row]:
    """Measure how long pruning holds the lock that ``record()`` needs, and what that does to it."""
    rows = []
    with _closing(path) as queue:
        outbox = _file(queue)
        held: list[float] = []
        lock = outbox._lock  # noqa: SLF001 - what record() waits for
        outbox._lock = _WatchedLock(lock, held)  # type: ignore[assignment]  # noqa: SLF001
        for batch in (50, 100, 200, 400):
            row = Row(group="pruning holds the lock", case=f"{batch} rows a step", unit="µs")
            for _ in range(size.rounds):
                steps = []
                began = time.perf_counter()
                for _ in range(size.prunes):
                    held.clear()
                    outbox.prune(2**62, 10**9, batch)
                    steps.append(max(held))  # it takes the lock twice: to look, and to delete
                    time.sleep(PAUSE)
                rate = size.prunes * batch / (time.perf_counter() - began)
                _tails(row, steps)
                row.metrics.setdefault("rows/s", []).append(rate)
            rows.append(row)
        outbox._lock = lock  # noqa: SLF001
        alone = Row(group="record(), paced", case="alone", unit="µs")
        beside = Row(group="record(), paced", case=f"beside pruning, {PRUNED} every 5 ms", unit="µs")
        for _ in range(size.rounds):
            _tails(alone, _beside(queue, size.beside, 0))
            _tails(beside, _beside(queue, size.beside, PRUNED))
        rows += [alone, beside]
    return rows


class _WatchedLock:
    """The outbox's lock, which takes note of how long one thread held it."""

    def __init__(self, lock: Any, held: list[float]) -> None:
        self._lock = lock
        self._held = held
        self._thread = threading.get_ident()
        self._since = 0

    def acquire(self, *arguments: Any, **options: Any) -> bool:
        got: bool = self._lock.acquire(*arguments, **options)
        if threading.get_ident() == self._thread:
            self._since = time.perf_counter_ns()
        return got

    def release(self) -> None:
        if threading.get_ident() == self._thread:
            self._held.append((time.perf_counter_ns() - self._since) / 1000)
        self._lock.release()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _is_owned(self) -> bool:
        return bool(self._lock._is_owned())  # noqa: SLF001 - as perqueue asks it


def _closing(path: Path) -> closing[PerQueue]:
    return closing(
        PerQueue(path, activity_type_id=KIND, base_url=_grown.ORIGIN, drain=False, max_pending=10**9)
    )


def _beside(queue: PerQueue, count: int, pruned: int) -> list[float]:
    """Return what ``record()`` took, beside a thread that prunes as the drain does, or does nothing."""
    outbox = queue._outbox  # noqa: SLF001 - what the drain calls
    over = threading.Event()

    def prune() -> None:
        while not over.wait(PAUSE):
            if pruned:
                outbox.prune(2**62, 10**9, pruned)

    thread = threading.Thread(target=prune)
    thread.start()
    times = []
    for number in range(count):
        began = time.perf_counter_ns()
        queue.record(GROUP, USERS[number % 1000])
        times.append((time.perf_counter_ns() - began) / 1000)
        time.sleep(0.0002)
    over.set()
    thread.join()
    return times


def _tails(row: Row, times: list[float]) -> None:
    times.sort()
    for name, place in (("p50", 0.5), ("p99", 0.99), ("max", 1)):
        row.metrics.setdefault(name, []).append(times[min(len(times) - 1, int(len(times) * place))])


def sizes(folder: Path, count: int, grown: dict[str, Path]) -> list[Row]:
    """Measure bytes on disk for each activity: of outboxes that were made, and of one really drained."""
    rows = [_size(path, f"{name}, as made", _rows_in(path)) for name, path in grown.items()]
    path = folder / "sample.db"
    with _closing(path) as queue:
        for number in range(count):
            queue.record(GROUP, USERS[number % 1000])
    rows.append(_size(path, f"{count:,} recorded", count))
    with _closing(path) as queue:
        _grown.deliver(_file(queue), count)
    rows.append(_size(path, f"{count:,} delivered, 32 in flight", count))
    with _closing(path) as queue:
        outbox = _file(queue)
        while outbox.prune(2**62, 10**9, 200):
            pass
        for number in range(count):
            queue.record(GROUP, USERS[number % 1000])
        _grown.deliver(outbox, count)
    rows.append(_size(path, "as many again, after pruning", count))
    return rows


def _rows_in(path: Path) -> int:
    with _closing(path) as queue:
        outbox = _file(queue)
        with outbox._reading() as connection:  # noqa: SLF001
            (pruned,) = connection.execute("SELECT pruned FROM perqueue_drain").fetchone()
        return outbox.position().last_id - int(pruned)


def _size(path: Path, case: str, count: int) -> Row:
    return Row(
        group="on disk, each", case=case, unit="bytes", metrics={"size": [path.stat().st_size / count]}
    )


def memory(paths: dict[str, Path], size: Size) -> list[Row]:
    """Measure the most memory that each kind of program has, on each outbox, in a process of its own."""
    count, seconds = (5000, 1.0) if size is FULL else (200, 0.2)
    cases = {
        f"record {count:,}": ("record", count),
        f"deliver {count:,}": ("drain", count),
        f"flush, {seconds:g} s": ("flush", seconds),
        "perqueue status": ("command", "status"),
        "perqueue rejected list": ("command", "rejected list"),
    }
    rows = []
    for case, (what, argument) in cases.items():
        base: list[float] = []
        for name, path in paths.items():
            row = Row(group=case, case=name, unit="MB, ms")
            for _ in range(min(3, size.rounds)):
                for metric, value in _frame.fresh("_grown.py", what, path, argument).items():
                    row.metrics.setdefault(metric, []).append(value)
            peaks = row.metrics["peak MB"]
            base = base or peaks
            row.metrics["growth MB"] = [statistics.median(peaks) - statistics.median(base)]
            rows.append(row)
    return rows


def show(rows: Sequence[Row]) -> None:
    """Print a table for each kind of figure."""
    kinds: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        kinds[tuple(row.metrics)].append(row)
    for metrics, some in kinds.items():
        lines = [
            (row.group, row.case, row.unit, *(_frame.spread(row.metrics[metric]) for metric in metrics))
            for row in some
        ]
        print(_frame.table(("", "", "", *metrics), lines), end="\n\n", flush=True)


def main() -> None:
    """Print what grows, and what does not."""
    parser = _frame.options(__doc__ or "")
    parser.add_argument("--folder", type=Path, help="keep the outboxes here, and use them again")
    parser.add_argument("--only", choices=("operations", "pruning", "sizes", "memory"))
    given = parser.parse_args()
    size = SMOKE if given.smoke else FULL
    with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
        folder = Path(given.folder or temporary)
        counts = {
            "empty": (0, 0),
            f"{size.pending:,} pending": (size.pending, 0),
            f"{size.settled:,} settled": (0, size.settled),
        }
        paths = {name: folder / f"{name.replace(',', '').replace(' ', '-')}.db" for name in counts}
        for name, path in paths.items():
            if not path.exists():
                print(f"making {path}", file=sys.stderr, flush=True)
                _grown.make(path, *counts[name])
        settled = paths[f"{size.settled:,} settled"]
        grown = {name: paths[name] for name, many in counts.items() if sum(many)}
        parts: dict[str, Callable[[], list[Row]]] = {
            "sizes": lambda: sizes(Path(temporary), 20_000, grown),
            "operations": lambda: operations(paths, size),
            "memory": lambda: memory(paths, size),
            "pruning": lambda: pruning(settled, size),
        }
        rows = []
        for part, measure in parts.items():
            if given.only in (None, part):
                some = measure()
                show(some)
                rows += some
        _frame.write(given.json, "growth", rows)


if __name__ == "__main__":
    main()
