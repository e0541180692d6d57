"""The results of all benchmarks: kept in a file, and shown as tables here and in the documentation."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from _frame import HERE, Row, figure, ratios, spread, table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Results = dict[str, dict[str, Any]]

RESULTS = HERE / "results.json"
DOCUMENTS = (HERE.parent / "docs" / "performance.md", HERE.parent / "docs" / "scaling.md")
DETAIL = "second by second"
"""Groups with this in their name are for a plot alone."""
_BLOCK = re.compile(r"(<!-- results: (?P<which>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_BASES = {
    "append and fdatasync",
    "bare INSERT, autocommit",
    "bare insert, SQLite's busy handler",
    "httpx.AsyncClient, shared",
    "nothing else happens",
    "tuned insert",
    "without coalescing",
}
"""The cases that the others of their group are compared with."""
_APART = {"bare asyncio streams, one at a time"}
"""What others need, and nobody compares."""
_RATIOS = {
    "requests/s": ("times the throughput", False),
    "CPU µs/request": ("times less CPU", True),
    "p50": ("times the p50", False),
}
"""What is compared: the column's title for each metric, and whether the ratio is turned round."""


def load(path: Path = RESULTS) -> Results:
    """Return what earlier runs have found."""
    if not path.exists():
        return {}
    loaded: Results = json.loads(path.read_text(encoding="utf-8"))
    for found in loaded.values():
        found["rows"] = [Row(**row) for row in found["rows"]]
    return loaded


def save(results: Results, path: Path = RESULTS) -> None:
    """Write the results, a line for each row."""
    parts = []
    for benchmark, found in sorted(results.items()):
        rows = ",\n".join(f"  {json.dumps(_rounded(row), ensure_ascii=False)}" for row in found["rows"])
        machine = json.dumps(found["machine"], ensure_ascii=False)
        parts.append(f'{json.dumps(benchmark)}: {{"machine": {machine}, "rows": [\n{rows}\n]}}')
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def _rounded(row: Row) -> dict[str, Any]:
    """Return a row for the file: four digits are more than any of them means."""
    metrics = {name: [float(f"{value:.4g}") for value in values] for name, values in row.metrics.items()}
    return asdict(replace(row, metrics=metrics))


def merge(results: Results, benchmark: str, machine: str, rows: list[Row]) -> None:
    """Put new rows in the place of their groups' old ones."""
    groups = {row.group for row in rows}
    old = results.get(benchmark, {"rows": []})["rows"]
    kept = [row for row in old if row.group not in groups]
    results[benchmark] = {"machine": machine, "rows": [*kept, *rows]}


def groups(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each group that is shown."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if DETAIL not in row.group:
            found.setdefault(row.group, []).append(row)
    return found


def cells(rows: list[Row]) -> list[list[str]]:
    """Return a group's table: its head, and a line of medians and ratios for each case."""
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    units = {row.unit for row in rows}
    head = [rows[0].unit if len(units) == 1 else "", *metrics]
    base = next((row.metrics for row in rows if row.case in _BASES), {})
    compared = [(metric, *_RATIOS[metric]) for metric in metrics if metric in _RATIOS and metric in base]
    head += [title for _, title, _ in compared]
    survives = any(row.survives for row in rows)
    lines = [head + ["survives"] * survives]
    for row in rows:
        line = [row.case if len(units) == 1 or not row.unit else f"{row.case}, {row.unit}"]
        line += [_value(row.metrics.get(metric), alone=not compared) for metric in metrics]
        for metric, _, less in compared:
            ours, theirs = [] if row.case in _APART else row.metrics.get(metric, []), base[metric]
            both = ratios(theirs, ours) if less else ratios(ours, theirs)
            line.append(spread(both) if both else "")
        lines.append(line + [row.survives or ""] * survives)
    return lines


def _value(values: list[float] | None, *, alone: bool) -> str:
    if not values:
        return ""
    return spread(values) if alone and len(values) > 1 else figure(statistics.median(values))


def terminal(results: Results) -> Iterator[str]:
    """Yield each group's table as text."""
    for found in results.values():
        for group, rows in groups(found["rows"]).items():
            head, *lines = cells(rows)
            head[0] = f"{group}{', ' if head[0] else ''}{head[0]}"
            yield table(head, lines)


def markdown(results: Results, which: str) -> str:
    """Return what stands in the documentation in a block of this name.

    That is "machine", "goals" or "scaling", or "BENCHMARK: GROUP", or "BENCHMARK: GROUP | GROUP ..." for one
    table of several, or either of these two with "; METRIC, METRIC ..." for some columns only.
    """
    if which == "machine":
        return "\n".join(dict.fromkeys(f"{found['machine']}.\n" for found in results.values()))
    if which in ("goals", "scaling"):
        lines = import_module(f"_{which}").lines
        return _pipes(lines({benchmark: found["rows"] for benchmark, found in results.items()}))
    benchmark, _, rest = which.partition(": ")
    names, _, metrics = rest.partition("; ")
    chosen = names.split(" | ")
    shown = groups(results[benchmark]["rows"])
    rows = [replace(row, metrics=_some(row, metrics)) for name in chosen for row in shown[name]]
    if len(chosen) > 1:
        rows = [replace(row, case=f"{row.group}: {row.case}") for row in rows]
    head, *lines = cells(rows)
    bold = len(chosen) == 1
    return _pipes(
        [head, *([f"**{case}**" if bold and _is_ours(case) else case, *more] for case, *more in lines)]
    )


def _pipes(lines: list[list[str]]) -> str:
    head, *lines = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines)) + "\n"


def _some(row: Row, metrics: str) -> dict[str, list[float]]:
    return {name: row.metrics[name] for name in metrics.split(", ")} if metrics else row.metrics


def _is_ours(case: str) -> bool:
    return case.startswith(("perqueue", "record()"))


def documented(text: str, results: Results) -> str:
    """Return a text with the tables of the results in it."""
    return _BLOCK.sub(lambda block: block[1] + markdown(results, block["which"]) + block[3], text)
