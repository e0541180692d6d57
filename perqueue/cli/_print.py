"""What is printed: tables, CSV, JSON, ages."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Any, overload

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_LEGIBLE = 20
"""Characters below which no column of a table is cut: a time has 19."""
_RECOGNISABLE = 12
"""The same for the last column, which has the longest texts."""
_NOT_ASCII = re.compile(r"[^\n -~]")

NO_SUM = (
    "A user who was active in several steps counts in each of them, and once in the whole period:"
    " the steps do not add up to it."
)


def to_terminal() -> bool:
    """Tell whether standard output is a terminal on which one may paint."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")


def as_json(data: object) -> None:
    """Print JSON; whatever JSON has no form for (a date, an enumeration's member) as its text."""
    click.echo(_json(data))


def _json(data: object) -> str:
    """Return JSON with letters of any script, and with what is not printable as its escape."""
    text = json.dumps(data, indent=2, ensure_ascii=False, default=_text)
    return _NOT_ASCII.sub(
        lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text
    )


def _text(value: object) -> str:
    return iso(value) if isinstance(value, datetime) else str(value)


def as_json_array(items: Iterable[object]) -> None:
    """Print a JSON array, each item as it comes: there may be more than fit into memory."""
    first = True
    for item in items:
        text = _json(item).replace("\n", "\n  ")
        click.echo(("[\n  " if first else ",\n  ") + text, nl=False)
        first = False
    click.echo("[]" if first else "\n]")


@overload
def iso(moment: datetime) -> str: ...
@overload
def iso(moment: datetime | None) -> str | None: ...
def iso(moment: datetime | None) -> str | None:
    """Return a moment as the outbox's view shows it: in UTC, with milliseconds and Z."""
    if moment is None:
        return None
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def as_csv(headings: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print CSV as it is; on a terminal, so that no text from outside can command it."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(headings)
    if sys.stdout.isatty():
        rows = ([printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    writer.writerows(rows)


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print columns, numbers aligned to the right; on a terminal, long texts are cut to keep to its width."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    if to_terminal():
        _narrow(widths, shutil.get_terminal_size().columns - 2 * (len(widths) - 1))
        headings, *cells = [
            [_cut(text, width) for text, width in zip(row, widths, strict=True)] for row in (headings, *cells)
        ]
    right = [bool(rows) and isinstance(value, int) for value in (rows[0] if rows else headings)]

    def line(parts: Sequence[str]) -> str:
        padded = (
            part.rjust(width) if number else part.ljust(width)
            for part, width, number in zip(parts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    click.echo(line(headings))
    click.echo("  ".join("─" * width for width in widths))
    for row in cells:
        click.echo(line(row))


def _narrow(widths: list[int], room: int) -> None:
    """Take from the last column, then from the widest ones, what is too much for a terminal."""
    too_much = max(0, sum(widths) - room)
    widths[-1] -= min(too_much, max(0, widths[-1] - _RECOGNISABLE))
    while sum(widths) > room and max(widths) > _LEGIBLE:
        widths[widths.index(max(widths))] -= 1


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else printable(str(value))


def printable(text: str) -> str:
    """Return text from outside (an ID, a reason) so that it cannot command the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def age(seconds: float) -> str:
    """Return a duration in at most two units: 45 s, 4 min, 2 h 10 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 1:
        return f"{minutes} min"
    if days < 1:
        return f"{hours} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{days:,} d" + (f" {hours % 24} h" if hours % 24 else "")


def rate(value: float) -> str:
    """Return a rate with as many digits as it deserves."""
    return f"{value:,.1f}" if 0 < abs(value) < 9.95 else f"{value:,.0f}"


def signed(value: float) -> str:
    """Return a rate of change."""
    if not round(value, 1):
        return "±0"
    return ("+" if value > 0 else "-") + rate(abs(value))
