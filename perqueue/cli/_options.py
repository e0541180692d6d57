"""Options that several commands share."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from perqueue.cli._failure import Misuse

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox import Operator

MAX_NUMBER = 2**63 - 1
"""The highest number that an activity can have."""


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


def existing(outbox: str) -> Path | DatabaseURL:
    """Return the place of an outbox; a file must be there, and what it holds is not checked."""
    from perqueue._settings import outbox_place

    path = outbox_place(outbox)
    if isinstance(path, Path) and not path.exists():
        message = f"there is no outbox at {path}: is the path right? The first record() creates it"
        raise Misuse(message)
    return path


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
