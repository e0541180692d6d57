"""A report on a terminal: tables with bars, and columns for each step of a series."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.bar import Bar
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from perqueue._words import counted
from perqueue.cli import _print

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from perqueue.cli._findings import Findings, Key

_ROWS = 50
"""Billing IDs of each activity type on a screen."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDEST_SPARK = 31


def paint(found: Findings, console: Console | None = None) -> None:
    """Print it."""
    console = console or Console(highlight=False, soft_wrap=False)
    counted = found.counted()
    for kind, (users, groups) in found.totals().items():
        console.print()
        console.print(_heading(kind, users, groups))
        console.print(_billing_ids(found, kind, counted))
        if groups > _ROWS:
            console.print(f"These are {_ROWS} of {groups:,}: see --csv, --json, --html.", style="dim")
    if found.by is not None:
        for kind, counts in found.series().items():
            console.print()
            console.print(Group(_name(kind, f", each {found.by}"), _steps(found, counts)))
        console.print()
        console.print(_print.NO_SUM, style="dim")


def _heading(kind: str, users: int, groups: int) -> Text:
    return _name(kind, f": {counted(users, 'unique user')} in {counted(groups, 'billing ID')}")


def _name(kind: str, more: str) -> Text:
    return Text(_print.printable(kind), "bold").append(more, "not bold")


def _table(*names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False, expand=True)
    for name in names:
        table.add_column(name, overflow="ellipsis", no_wrap=True, ratio=2)
    table.add_column("unique", justify="right", no_wrap=True)
    table.add_column("", ratio=3)
    return table


def _billing_ids(found: Findings, kind: str, counted: Sequence[dict[Key, int] | None]) -> Table:
    table = _table("billing ID")
    series = found.by is not None and len(found.steps) <= _WIDEST_SPARK
    if series:
        table.columns[2].header = f"each {found.by}"
    ranked = found.ranked(kind, _ROWS)
    top = max((count for _, count in ranked), default=0)
    for billing_id, count in ranked:
        bar: RenderableType = _bar(count, top)
        if series:
            bar = _spark([None if step is None else step.get((kind, billing_id), 0) for step in counted])
        table.add_row(_print.printable(billing_id), f"{count:,}", bar)
    return table


def _steps(found: Findings, counts: Sequence[int | None]) -> Table:
    table = _table(f"{found.by} from")
    top = max((count or 0 for count in counts), default=0)
    for step, count in zip(found.steps, counts, strict=True):
        name = f"{step.span.start:%a %Y-%m-%d}" + ("" if step.span.whole else " (in part)")
        if count is None:
            table.add_row(name, Text("?", "red"), Text("no answer from Per", "red"))
        else:
            table.add_row(name, f"{count:,}", _bar(count, top))
    return table


def _bar(count: int, top: int) -> RenderableType:
    return Bar(max(top, 1), 0, count, color="blue")


def _spark(values: Sequence[int | None]) -> Text:
    top = max((value or 0 for value in values), default=0) or 1
    text = Text(no_wrap=True)
    for value in values:
        if value is None:
            text.append("?", "red")
        else:
            text.append(_BLOCKS[(value * 8 - 1) // top] if value else " ", "blue")
    return text
