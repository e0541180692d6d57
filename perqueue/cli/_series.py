"""A period in steps: one report of Per's for each day, week or month of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from perqueue.cli._failure import Misuse
from perqueue.exceptions import AuthenticationError, PerAPIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tenacity import RetryCallState

    from perqueue._report import Report

    GetReport = Callable[[datetime | str | None, datetime | str | None], Report]

By = Literal["day", "week", "month"]
MOST_STEPS = 400
"""A year of days, and a little: one request each."""
_MILLISECOND = timedelta(milliseconds=1)
_TRIES = 3
_FAILED_IN_A_ROW = 3
_BACKOFF = wait_exponential(multiplier=2, max=30) + wait_random(0, 2)
_LONGEST_WAIT = 60.0
"""Seconds that Per may ask to wait: who looks at a terminal does not wait longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One step of a series, both ends included; times in UTC."""

    start: datetime
    end: datetime
    whole: bool
    """Not cut by the period's ends, and over when it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What Per said of one step."""

    span: Span
    usage: Report | None
    """None: nothing, which is not zero; then ``error`` says why."""
    error: str | None = None


def spans(start: datetime, end: datetime | None, by: By, now: datetime) -> list[Span]:
    """Cut a period into calendar days, weeks (from Monday) or months, all in UTC.

    What has not begun yet is left out. Raises :class:`Misuse` if they are too many.
    """
    found: list[Span] = []
    since, last = start.astimezone(UTC), now if end is None else min(end, now)
    while since <= last:
        if len(found) == MOST_STEPS:
            message = (
                f"by {by}, this period takes more than {MOST_STEPS} requests to Per, one for each {by}:"
                " choose a shorter period or longer steps"
            )
            raise Misuse(message)
        begins, following = _calendar(since, by)
        until = following - _MILLISECOND
        if end is not None:
            until = min(until, end)
        is_whole = since == begins and until == following - _MILLISECOND and until < now
        found.append(Span(start=since, end=until, whole=is_whole))
        since = following
    return found


def _calendar(moment: datetime, by: By) -> tuple[datetime, datetime]:
    """Return when the day, week or month of a moment begins, and when the next one does."""
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if by == "day":
        return day, day + timedelta(days=1)
    if by == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    first = day.replace(day=1)
    return first, (first + timedelta(days=31)).replace(day=1)


def ask(
    get_report: GetReport, wanted: Sequence[Span], sleep: Callable[[float], None] = time.sleep
) -> Iterator[Step]:
    """Yield what Per says of each span, asked one after the other.

    A failure that may pass is tried again, after some seconds. One of too many requests, or several in a
    row, ends the asking; what was not asked says so. Raises :class:`~perqueue.AuthenticationError`.
    """
    failed = 0
    given_up: str | None = None
    for span in wanted:
        if given_up is not None:
            yield Step(span=span, usage=None, error=given_up)
            continue
        try:
            usage = _patiently(sleep)(get_report, span.start, span.end)
        except AuthenticationError:
            raise
        except PerAPIError as error:
            failed += 1
            yield Step(span=span, usage=None, error=str(error))
            if error.status == 429 or failed == _FAILED_IN_A_ROW:
                given_up = f"not asked, after {error}"
        else:
            failed = 0
            yield Step(span=span, usage=usage)


def _patiently(sleep: Callable[[float], None]) -> Retrying:
    return Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(_TRIES),
        wait=_wait,
        sleep=sleep,
        reraise=True,
    )


def _wait(state: RetryCallState) -> float:
    """Return how long to wait: as long as Per asks for, and longer from time to time."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, PerAPIError) else None
    return (asked or 0.0) + _BACKOFF(state)


def _may_pass(error: BaseException) -> bool:
    if not isinstance(error, PerAPIError) or isinstance(error, AuthenticationError):
        return False
    if error.retry_after is not None and error.retry_after > _LONGEST_WAIT:
        return False
    return error.status is None or error.status in (408, 425, 429) or error.status >= 500
