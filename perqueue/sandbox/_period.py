"""Timestamps as Per writes them, and the period that a report covers by default."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

_TIMESTAMP: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}(\.\d{3})?Z", re.ASCII)
_MILLISECOND: Final = timedelta(milliseconds=1)
# Per counts in milliseconds: an end of 23:59:59.999 covers that whole millisecond.
REST_OF_MILLISECOND: Final = timedelta(microseconds=999)


def utc_now() -> datetime:
    """Return the present moment, aware and in UTC."""
    return datetime.now(UTC)


def parse_timestamp(text: str) -> datetime | None:
    """Read `YYYY-MM-DDTHH:MM:SSZ`, with or without milliseconds; `None` if it is neither."""
    if _TIMESTAMP.fullmatch(text) is None:
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def format_timestamp(moment: datetime) -> str:
    """Write a moment as Per's responses do: UTC, with milliseconds and `Z`."""
    text = moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")
    return f"{text}Z"


def prior_month(now: datetime) -> tuple[datetime, datetime]:
    """Return the first and the last millisecond of the calendar month (UTC) before `now`."""
    this_month = now.astimezone(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = this_month - _MILLISECOND
    return end.replace(day=1, hour=0, minute=0, second=0, microsecond=0), end
