"""Columns over time, drawn with block characters."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"

Column = tuple[int, str]
"""A height, and its colour."""


def chart(columns: Sequence[Column], width: int, height: int, *, least: int = 1) -> list[Text]:
    """Return the lines of a chart that the highest column fills, if it is as high as ``least``."""
    columns = _fitted(columns, width)
    top = max(least, *(value for value, _ in columns), 1)
    rows = [Text(no_wrap=True) for _ in range(height)]
    for value, colour in columns:
        eighths = round(value / top * height * 8)
        if value and not eighths:
            eighths = 1
        for number, row in enumerate(rows):
            fill = max(0, min(8, eighths - (height - 1 - number) * 8))
            row.append(_BLOCKS[fill], colour)
    return rows


def _fitted(columns: Sequence[Column], width: int) -> Sequence[Column]:
    """Return at most so many columns: one for each moment, else the highest of several."""
    if len(columns) <= width:
        return columns
    edges = [len(columns) * column // width for column in range(width + 1)]
    return [max(columns[a:b]) for a, b in pairwise(edges)]
