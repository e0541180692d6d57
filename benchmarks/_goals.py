"""What was aimed at, and what became of it: a table of docs/performance.md."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _frame import Row, figure, ratios, spread

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = dict[str, list[Row]]
    Values = Callable[[Rows], list[float]]


@dataclass(frozen=True)
class Goal:
    """A figure, and its bound."""

    text: str
    bound: float
    values: Values
    unit: str = ""
    at_least: bool = False
    in_every_round: bool = False
    """The worst round decides, and not the median of all."""

    def line(self, found: Rows) -> list[str]:
        """Return its line of the table."""
        values = self.values(found)
        unit = f" {self.unit}" if self.unit else ""
        asked = f"{'at least' if self.at_least else 'at most'} {figure(self.bound)}{unit}"
        if not values:
            return [self.text, asked, "", "not measured"]
        met = self._met(values)
        return [self.text, asked, spread(values), "met" if met else "**missed**"]

    def _met(self, values: list[float]) -> bool:
        judged = values if self.in_every_round else [statistics.median(values)]
        return min(judged) >= self.bound if self.at_least else max(judged) <= self.bound


def of(benchmark: str, group: str, case: str, metric: str) -> Values:
    """Return a case's figure of each round."""
    return lambda found: next(
        (row.metrics[metric] for row in found.get(benchmark, []) if (row.group, row.case) == (group, case)),
        [],
    )


def times(ours: Values, theirs: Values) -> Values:
    """Return the ratio of each round."""
    return lambda found: ratios(ours(found), theirs(found))


def worst(*some: Values) -> Values:
    """Return the figures with the highest median."""
    return lambda found: max((one(found) for one in some), key=lambda all_: statistics.median(all_ or [0]))


_OURS = "perqueue record()"
_LARGE = "10,000,000 pending", "30,000,000 settled"
_IDLE = "drain", "0 ms, 32 in flight"


def _call(case: str, metric: str) -> Values:
    return of("record", "one event, one thread", case, metric)


def _power(case: str, metric: str) -> Values:
    return of("record_shared", 'durability="power"', case, metric)


def _beside(case: str, metric: str) -> Values:
    return of("record_draining", "record() 500 times a second, while", case, metric)


def _grown(operation: str, metric: str) -> Values:
    return worst(*(of("growth", operation, case, metric) for case in _LARGE))


def _grows(case: str) -> Values:
    return worst(*(of("growth", group, case, "growth MB") for group in ("record 5,000", "deliver 5,000")))


GOALS = [
    Goal(
        "`record()`, p50, in times of a tuned insert",
        1.6,
        times(_call(_OURS, "p50"), _call("tuned insert", "p50")),
    ),
    Goal(
        "… in times of OpenTelemetry's log",
        1.0,
        times(_call(_OURS, "p50"), _call("OpenTelemetry log, batch", "p50")),
    ),
    Goal("… p99.9, nothing else happens", 150, _call(_OURS, "p99.9"), "µs"),
    *(
        Goal(f"… p99, 4 {parties}", 300, of("record_shared", f"4 {parties}, 500/s each", _OURS, "p99"), "µs")
        for parties in ("threads", "processes")
    ),
    Goal(
        '… `durability="power"`, p50, in times of an append and fdatasync',
        1.15,
        times(_power(_OURS, "p50"), _power("append and fdatasync", "p50")),
    ),
    Goal(
        "… calls/s of 8 threads, in times of one",
        3,
        times(_power(f"{_OURS}, 8 threads", "calls/s"), _power(_OURS, "calls/s")),
        at_least=True,
    ),
    Goal(
        "… it drains, server at 50 ms, p50",
        25,
        _beside("it drains, server at 50 ms, 32 in flight", "p50"),
        "µs",
    ),
    Goal(
        "… it drains, server at 50 ms, p99",
        500,
        _beside("it drains, server at 50 ms, 32 in flight", "p99"),
        "µs",
    ),
    Goal("… it drains, server at 0 ms, p99", 2500, _beside("it drains, server at 0 ms", "p99"), "µs"),
    *(
        goal
        for name, least, most in (("perqueue", 8, 250), ("perqueue[fast]", 14, 150))
        for goal in (
            Goal(
                f"Delivering, {name}, 0 ms: in times of httpx's throughput",
                least,
                times(of(*_IDLE, name, "requests/s"), of(*_IDLE, "httpx.AsyncClient, shared", "requests/s")),
                at_least=True,
            ),
            Goal("… CPU for each", most, of(*_IDLE, name, "CPU µs/request"), "µs"),
        )
    ),
    *(
        Goal(
            f"… {name}, 50 ms, {many} in flight: of what the latency allows",
            95,
            of("drain", f"50 ms, {many} in flight", name, "% of in flight/RTT"),
            "%",
            at_least=True,
        )
        for name in ("perqueue", "perqueue[fast]")
        for many in (8, 32, 128)
    ),
    Goal(
        "… of a rate limit: taken",
        90,
        of("drain", "rate limit", "100 requests/s", "taken, % of the limit"),
        "%",
        at_least=True,
    ),
    Goal("… refused", 2, of("drain", "rate limit", "100 requests/s", "refused, % of the answers"), "%"),
    Goal(
        "Coalescing: `record()` of a key that is known, p50",
        1.5,
        of("record_coalescing", "one record()", "of a key that is known", "p50"),
        "µs",
    ),
    Goal(
        "… requests for 1,000,000 records of 10,000 users",
        10_000,
        of("record_coalescing", "1,000,000 records of 10,000 users", "coalesced", "requests"),
    ),
    *(
        Goal(f"Growth: {operation}, in times of an empty outbox", 1.3, _grown(operation, "ratio p50"))
        for operation in ("record()", "claim, each", "settle, each")
    ),
    Goal("… opening the outbox", 50, _grown("opening, ms", "p50"), "ms"),
    Goal(
        "… a step of pruning, the longest",
        1000,
        of("growth", "pruning holds the lock", "50 rows a step", "max"),
        "µs",
        in_every_round=True,
    ),
    Goal(
        "… a step of pruning, p99",
        1000,
        of("growth", "pruning holds the lock", "50 rows a step", "p99"),
        "µs",
    ),
    Goal(
        "… on disk, pending",
        130,
        of("growth", "on disk, each", "10,000,000 pending, as made", "size"),
        "bytes",
    ),
    Goal(
        "… on disk, settled",
        200,
        of("growth", "on disk, each", "30,000,000 settled, as made", "size"),
        "bytes",
    ),
    Goal("… memory that recording or delivering takes more", 10, worst(*map(_grows, _LARGE)), "MB"),
    Goal(
        "Start: `import perqueue`, beyond sqlite3",
        40,
        of("startup", "imports", "import perqueue, beyond that", "a fresh interpreter"),
        "ms",
    ),
    Goal(
        "… the first `record()`",
        20,
        of("startup", "a new outbox", "the first record()", "a fresh interpreter"),
        "ms",
    ),
]


def lines(found: Rows) -> list[list[str]]:
    """Return the table: its head, and a line for each goal."""
    return [["", "goal", "here", ""], *(goal.line(found) for goal in GOALS)]
