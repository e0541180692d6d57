"""What so many deliveries a day ask for, calculated from what was measured."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _frame import Row

DAY = 86_400
PEAK = 3
"""Times the mean of a day that its busiest hour has: an assumption."""
ROUND_TRIP = 0.05
"""Seconds in which Per answers: an assumption, and what the benchmark's server does."""
RETENTION = 35
MOST_KEPT = 10_000_000
REQUEST, ANSWER, FRAMES = 357, 209, 2 * (20 + 32 + 29)
"""Bytes of a request with IDs of 30 characters and a token of 40, of the sandbox's answer, and of IP, TCP and
TLS around the two."""
SPARE = 1.5


def lines(found: dict[str, list[Row]]) -> list[list[str]]:
    """Return a table: its head, and a line for each scale."""
    cpu = _of(found["drain"], "50 ms, 128 in flight", "perqueue", "CPU µs/request")
    most = _of(found["drain"], "50 ms, 128 in flight", "perqueue", "requests/s")
    bytes_each = _of(found["growth"], "on disk, each", "30,000,000 settled, as made", "size")
    pending = _of(found["growth"], "on disk, each", "10,000,000 pending, as made", "size")
    head = ["delivered a day", "a second, mean", "in the busiest hour", "connections then", "cores then"]
    head += ["Mbit/s then", "drainers", "backlog of an hour", "trail of 35 days", "kept by one outbox"]
    table = [head]
    for exponent in (3, 5, 7, 8, 9):
        mean = 10**exponent / DAY
        peak = PEAK * mean
        drainers = max(1, math.ceil(SPARE * peak / most))
        kept = min(MOST_KEPT, 10**exponent * RETENTION / drainers)
        table.append(
            [
                f"{10**exponent:,}",
                _short(mean),
                _short(peak),
                f"{max(1, math.ceil(peak * ROUND_TRIP)):,}",
                _short(peak * cpu / 1e6),
                _short(peak * (REQUEST + ANSWER + FRAMES) * 8 / 1e6),
                f"{drainers}",
                _bytes(peak * 3600 * pending),
                _bytes(10**exponent * RETENTION * bytes_each),
                f"{_days(kept * drainers / 10**exponent)}, {_bytes(kept * bytes_each)}",
            ]
        )
    return table


def _of(rows: list[Row], group: str, case: str, metric: str) -> float:
    [values] = [row.metrics[metric] for row in rows if (row.group, row.case) == (group, case)]
    return statistics.median(values)


def _short(value: float) -> str:
    if value < 0.01:
        return "< 0.01"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _bytes(size: float) -> str:
    for unit, each in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= each:
            return f"{_short(size / each)} {unit}"
    return f"{_short(size / 1e3)} kB"


def _days(days: float) -> str:
    return f"{_short(days)} days" if days >= 2 else f"{_short(days * 24)} h"
