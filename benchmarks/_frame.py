"""What the benchmarks have in common: options, fresh processes, a table, and a file of results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sqlite3
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

HERE = Path(__file__).parent
_LONGEST = 600
"""Seconds after which a program that is measured counts as hung."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one case: for each metric one value a round."""

    group: str
    case: str
    unit: str = ""
    survives: str | None = None
    metrics: dict[str, list[float]] = field(default_factory=dict)


def options(description: str) -> argparse.ArgumentParser:
    """Return what every benchmark understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="a few calls of each case: does it still run?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    return parser


def fresh(script: str, *arguments: object) -> Any:
    """Run one of the scripts here in an interpreter of its own; return what its last line says in JSON."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    # Modules are compiled once, as in every installation, and not with each start.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=_LONGEST, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> str:
    """Return what the figures depend on, in one line."""
    cpus = re.findall(r"model name\s*: (.*)", _read("/proc/cpuinfo")) or [platform.machine()]
    kernel = re.match(r"\d+\.\d+", platform.release())
    return (
        f"{cpus[0].strip()}, {len(os.sched_getaffinity(0))} cores, Linux {kernel[0] if kernel else ''},"
        f" Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def figure(value: float) -> str:
    """Return a number with three digits, as far as it has them."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """Return the median, and behind it the lowest and highest of several rounds."""
    middle = figure(statistics.median(values))
    ends = [figure(min(values)), figure(max(values))]
    return middle if ends == [middle, middle] else f"{middle} ({ends[0]} to {ends[1]})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return each round's ratio: what two cases had of the same minute."""
    return [ours / theirs for ours, theirs in zip(values, base, strict=False) if theirs]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return aligned columns, the first to the left and the others to the right."""
    cells = [list(head), *map(list, lines)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def write(path: Path | None, benchmark: str, rows: Sequence[Row]) -> None:
    """Write the results, if they are wanted."""
    if path is not None:
        text = json.dumps({"benchmark": benchmark, "rows": [asdict(row) for row in rows]}, indent=1)
        path.write_text(text, encoding="utf-8")
