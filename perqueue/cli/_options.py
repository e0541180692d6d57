"""Options that several commands share."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perqueue.cli._failure import Misuse

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox import Operator

_MAX_NUMBER = 2**63 - 1


class _Number(click.ParamType[int]):
    """The number of an activity in its outbox."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return int(click.IntRange(1, _MAX_NUMBER).convert(value, param, ctx))


NUMBER = _Number()


class _Duration(click.ParamType[float]):
    """A length of time, in seconds."""

    name = "duration"
    _seconds = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # noqa: RUF012 - never changed

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"(\d{1,9})([smhd])", str(value), re.ASCII)
        if match is None:
            self.fail("write a whole number and s, m, h or d, such as 30s, 5m, 2h or 1d.", param, ctx)
        return float(int(match[1]) * self._seconds[match[2]])


DURATION = _Duration()


class Seconds(click.FloatRange):
    """A finite number of seconds: to click, "nan" is within every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{seconds} is not a number of seconds.", param, ctx)
        return seconds


outbox_option = click.option(
    "--outbox",
    "-o",
    type=click.Path(readable=False),  # for completion: what is wrong with a path, the outbox says better
    envvar="PERQUEUE_OUTBOX",
    show_envvar=True,
    required=True,
    metavar="PATH_OR_URL",
    help="The outbox: a file, or a postgresql:// URL.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
TABLE_LIMIT = 1000
"""Rows of a table, unless asked for more: its columns are as wide as the widest."""
limit_option = click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Show at most so many. [default: all; in a table {TABLE_LIMIT}]",
)


def existing(outbox: str) -> Path | DatabaseURL:
    """Return the place of an outbox; a file must be there, and what it holds is not checked."""
    from perqueue._settings import outbox_place

    place = outbox_place(outbox)
    if is_missing(place):
        raise Misuse(missing(place))
    return place


def is_missing(place: Path | DatabaseURL) -> bool:
    """Tell whether there is no such file; a database is asked when it is opened."""
    return isinstance(place, Path) and not place.exists()


def missing(place: Path | DatabaseURL) -> str:
    """Return what there is to say then."""
    return f"there is no outbox at {place}: is the path right? The first record() creates it"


def existing_file(outbox: str) -> Path:
    """Return the path of an outbox file that must be there."""
    path = existing(outbox)
    if not isinstance(path, Path):
        message = f"{path} is a database: its own tools look after it; this command is for outbox files"
        raise Misuse(message)
    return path


def open_as_operator(outbox: str) -> Operator:
    """Open an existing outbox, whatever origin it belongs to, without delivering anything."""
    from perqueue._outbox import open_as_operator as opened

    return opened(existing(outbox))


def outbox_to_read(outbox: str) -> Path | DatabaseURL:
    """Return the place of what is an outbox, of whatever origin, brought up to date."""
    from perqueue._outbox import bring_up_to_date

    place = existing(outbox)
    bring_up_to_date(place)
    return place


def check_comparable(place: Path | DatabaseURL) -> None:
    """Bring an outbox up to date; refuse one that does not deliver to the Per whose report is asked for."""
    from perqueue._outbox import bring_up_to_date, open_trail
    from perqueue._settings import DEFAULT_BASE_URL, checked_base_url, origin_of

    bring_up_to_date(place)
    asked = origin_of(checked_base_url(os.environ.get("PER_BASE_URL") or DEFAULT_BASE_URL))
    with open_trail(place) as trail:
        origin = trail.origin()
    if origin not in {None, asked}:
        message = (
            f"this outbox belongs to {origin}, not to {asked}: PER_BASE_URL says whose report is asked for"
        )
        raise Misuse(message)


def is_embedded(outbox: str) -> bool:
    """Tell whether an outbox is in an application's own database."""
    from perqueue._outbox.connection import is_embedded
    from perqueue._settings import outbox_place

    place = outbox_place(outbox)
    return isinstance(place, Path) and is_embedded(place)


def need_token(name: str, scope: str) -> None:
    """Say what to do if a token is missing; the library's own text speaks to programmers."""
    if not os.environ.get(name):
        message = f"{name} is not set: export the token that has the scope {scope} (it cannot be an argument)"
        raise Misuse(message)


def examples(*lines: str) -> str:
    """Return the epilog of a help text: click must not fold these lines."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in lines)])


def moment(text: str | None, edge: time = time.min) -> datetime | str | None:
    """Return a date as a moment; what is no date is for the library to judge."""
    if text is None:
        return None
    with suppress(ValueError):  # 20181201, too
        return datetime.combine(date.fromisoformat(text), edge, UTC)
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return text
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
