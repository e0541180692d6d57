"""Where bars and columns stand, in percent: they stretch with the page, and their labels do not."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

_LABELS = 7
"""As many fit below the columns on a telephone."""
_FEW = (1, 2, 4, 6, 8, 10)
_NICE = (12, 16, 20, 30, 40, 50, 60, 80, 100)


def top_of(values: Sequence[int | None]) -> int:
    """Return a round number that no column exceeds, and that has a half."""
    highest = max((value or 0 for value in values), default=0)
    if highest <= _FEW[-1]:
        return next(nice for nice in _FEW if nice >= highest)
    power = 1
    while highest > _NICE[-1] * power:
        power *= 10
    return next(nice * power for nice in _NICE if nice * power >= highest)


def columns(
    values: Sequence[int | None], names: Sequence[str], labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a column for each value; one that is unknown has no height."""
    top, slot = top_of(values), 100 / len(values) if values else 100
    every = ceil(len(values) / _LABELS)
    room = len(values) if every == 1 else 0.85 * len(values)
    return [
        _place(number, len(values))
        | {
            "value": value,
            "name": name,
            "x": f"{(number + 0.12) * slot:.3f}%",
            "width": f"{0.76 * slot:.3f}%",
            "y": f"{100 - _height(value, top):.2f}%",
            "height": f"{_height(value, top):.2f}%",
            "label": label if number % every == 0 and number <= room else None,
        }
        for number, (value, name, label) in enumerate(zip(values, names, labels, strict=True))
    ]


def _place(number: int, count: int) -> dict[str, str]:
    """Return where the label of a column stands, below it."""
    if count <= _LABELS:
        return {"anchor": "middle", "label_x": f"{(number + 0.5) * 100 / count:.3f}%"}
    return {"anchor": "start", "label_x": f"{(number + 0.12) * 100 / count:.3f}%"}


def spark(values: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return small columns without labels, the highest of them as high as there is room."""
    top, slot = max((value or 0 for value in values), default=0) or 1, 100 / len(values) if values else 100
    return [
        {
            "value": value,
            "x": f"{number * slot:.2f}%",
            "width": f"{0.8 * slot:.2f}%",
            "y": f"{100 - _height(value, top):.1f}%",
            "height": f"{_height(value, top):.1f}%",
        }
        for number, value in enumerate(values)
        if value != 0
    ]


def _height(value: int | None, top: int) -> float:
    """Return percent; the smallest number above zero is still to be seen."""
    return max(1.5, 100 * value / top) if value else 0.0
