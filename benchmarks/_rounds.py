"""Cases of ``record()``: each in a fresh process a round, turn by turn, and their tables."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _frame import Row, figure, fresh, options, ratios, spread, table, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Metrics = dict[str, float]

ROUNDS = 7
_SMOKE = 0.02
"""The part of all calls that shows whether a case still runs."""
_PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of a table."""

    group: str
    name: str
    run: Callable[[Path, float], Metrics]
    """Measures in an empty folder, with a part (0 to 1) of all calls."""
    unit: str = "µs"
    survives: str | None = None
    base: bool = False
    """The ratios of its group are to this one."""
    smoke: bool = True
    """Whether ``make bench-smoke`` runs it: not, where another case runs the same code."""

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.group}: {self.name}"


def percentiles(nanoseconds: Sequence[int]) -> Metrics:
    """Return the usual percentiles, in microseconds."""
    ordered = sorted(nanoseconds)
    last = len(ordered) - 1
    return {name: ordered[min(last, int(len(ordered) * part))] / 1000 for name, part in _PERCENTILES.items()}


def timed(
    call: Callable[[int], object], calls: int, *, seconds: float = 2.0, warm_up: int = 200
) -> list[int]:
    """Return how many nanoseconds each call took, one right after the other, for some seconds at most."""
    clock = time.perf_counter_ns
    for number in range(warm_up):
        call(number)
    times = []
    deadline = clock() + int(seconds * 1e9)
    for number in range(warm_up, warm_up + calls):
        began = clock()
        call(number)
        ended = clock()
        times.append(ended - began)
        if ended > deadline:
            break
    return times


def paced(call: Callable[[int], object], calls: int, *, rate: float, warm_up: int = 50) -> list[int]:
    """Return how many nanoseconds each call took, so many calls a second."""
    clock = time.perf_counter_ns
    interval = int(1e9 / rate)
    times = []
    due = clock()
    for number in range(warm_up + calls):
        due += interval
        wait = due - clock()
        if wait > 0:
            time.sleep(wait / 1e9)
        began = clock()
        call(number)
        times.append(clock() - began)
    return times[warm_up:]


def main(benchmark: str, script: str, description: str, cases: Iterable[Case]) -> None:
    """Run the cases as the command line asks."""
    parser = options(description)
    parser.add_argument("--rounds", type=int, help=f"how many (default: {ROUNDS})")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose group or name contains it")
    parser.add_argument("--case", help="measure one here, and print its figures")
    asked = parser.parse_args()
    by_key = {case.key: case for case in cases}
    if asked.case:
        print(json.dumps(_measure(by_key[asked.case], _SMOKE if asked.smoke else 1.0)))
        return
    chosen = [case for key, case in by_key.items() if asked.only in key and (case.smoke or not asked.smoke)]
    rounds = asked.rounds or (1 if asked.smoke else ROUNDS)
    rows = _in_turn(script, chosen, rounds, ["--smoke"] if asked.smoke else [])
    print(
        f"Medians of {rounds} rounds; the ratio is that of the first column, with its spread over the rounds."
    )
    for group in dict.fromkeys(case.group for case in chosen):
        base = next((rows[case.key] for case in chosen if case.base and case.group == group), None)
        _print_group(group, [row for row in rows.values() if row.group == group], base)
    write(asked.json, benchmark, list(rows.values()))


def _measure(case: Case, part: float) -> Metrics | str:
    with tempfile.TemporaryDirectory() as folder:
        try:
            return case.run(Path(folder), part)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("perqueue"):
                raise  # no peer: what is measured here is broken
            return str(error)


def _in_turn(script: str, cases: Iterable[Case], rounds: int, arguments: list[str]) -> dict[str, Row]:
    rows = {
        case.key: Row(group=case.group, case=case.name, unit=case.unit, survives=case.survives)
        for case in cases
    }
    for _ in range(rounds):
        for key, row in list(rows.items()):
            measured = fresh(script, "--case", key, *arguments)
            if isinstance(measured, str):
                print(f"skipped: {row.case} ({measured})", file=sys.stderr)
                del rows[key]
                continue
            for metric, value in measured.items():
                row.metrics.setdefault(metric, []).append(value)
    return rows


def _print_group(group: str, rows: list[Row], base: Row | None) -> None:
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    head = [f"{group}, {rows[0].unit}" if rows else group, *metrics, *(["ratio"] if base else []), "survives"]
    lines = []
    for row in rows:
        line = [row.case]
        line += [
            figure(statistics.median(row.metrics[metric])) if metric in row.metrics else ""
            for metric in metrics
        ]
        if base:
            line.append(spread(ratios(row.metrics[metrics[0]], base.metrics[metrics[0]])))
        lines.append([*line, row.survives or ""])
    print(f"\n{table(head, lines)}")
