"""Counting unique users of a period, however many there are.

What each user did is gathered in a database of its own, on disk where memory does not suffice, which is
gone when it is closed.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from perqueue._activity import State
from perqueue._answers import may_have_counted
from perqueue._outbox.trail import TRACE
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._outbox.open import Trail
    from perqueue._outbox.trail import Traced

# Of what was recorded long before, most was settled long before: those are left out by SQLite itself.
_RELEVANT = (
    f"{TRACE} WHERE a.id BETWEEN ? AND ? AND (a.recorded_at >= ? OR s.settled_at >= ?"
    " OR s.activity_id IS NULL) ORDER BY a.id"
)
_ATTEMPTED = (
    "SELECT activity_id, reason FROM perqueue_attempt"
    " WHERE activity_id BETWEEN ? AND ? AND attempted_at <= ? AND attempted_at + duration_ms >= ?"
)
_TABLE = (
    "CREATE TABLE did (kind TEXT, billing_id TEXT, user_id TEXT, what INTEGER,"
    " PRIMARY KEY (kind, billing_id, user_id)) WITHOUT ROWID"
)
_ADD = "INSERT INTO did VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET what = what | excluded.what"


class Period(NamedTuple):
    """From when to when, both included, in milliseconds since the epoch."""

    start: int
    end: int
    """What arrived later is not in it for certain."""
    end_at_most: int
    """Later than ``end`` if the report was made before the period was over: between the two, who knows."""


# What a user's activities of one type did, as far as a period is concerned. Plain numbers: an
# enumeration's operators cost more than all the rest of counting.
_RECORDED = 1
"""Was recorded in it."""
_DELIVERED = 2
"""Was accepted in it, by the time of Per's answer."""
_ARRIVED = 4
"""Was sent and accepted in it: Per has it in there."""
_STRADDLED = 8
"""Was sent on one side of a boundary and accepted on the other."""
_UNANSWERED = 16
"""Was sent in it without an answer: Per may have counted it."""
_LATE = 32
"""Was recorded before a boundary of it and sent after that."""
_PENDING = 64
_REJECTED = 128

_SHOWN = (
    _RECORDED,
    _DELIVERED,
    _LATE,
    _STRADDLED,
    _PENDING,
    _REJECTED,
    _ARRIVED,
    _ARRIVED | _STRADDLED | _UNANSWERED,
    _UNANSWERED,
)
_COUNT = (
    f"SELECT kind, billing_id, {', '.join(f'count(nullif(what & {flags}, 0))' for flags in _SHOWN)}"
    " FROM did GROUP BY kind, billing_id"
)


class Count(NamedTuple):
    """Unique users of one activity type and billing ID."""

    activity_type_id: str
    billing_id: str
    recorded: int = 0
    delivered: int = 0
    late: int = 0
    uncertain: int = 0
    pending: int = 0
    rejected: int = 0
    least: int = 0
    """Users that Per must have counted."""
    most: int = 0
    """Users that Per can have counted."""
    unanswered: int = 0
    """Users with a request that ended without an answer."""


class Tally(NamedTuple):
    """What an outbox knows of a period."""

    counts: list[Count]
    lost_through: int
    """Settled activities up to this time may have been deleted (milliseconds since the epoch)."""
    damaged: int
    """Activities that cannot be counted, because nobody knows whose they are."""


def tally(trail: Trail, period: Period) -> Tally:
    """Count what concerns a period.

    Raises :class:`~perqueue.OutboxError`, also if there is no room for what does not fit into memory.
    """
    damaged = 0
    with _room(), closing(sqlite3.connect("", isolation_level=None)) as gathered:
        for pragma in ("journal_mode = OFF", "cache_size = -65536"):
            gathered.execute(f"PRAGMA {pragma}")
        gathered.execute(_TABLE)
        for low, high in trail.slices_until(period.end_at_most + 1):
            did, bad = _look(trail, period, low, high)
            damaged += bad
            gathered.execute("BEGIN")
            gathered.executemany(_ADD, [(*key, what) for key, what in did.items()])
            gathered.execute("COMMIT")
        counts = [Count(*row) for row in gathered.execute(_COUNT)]
    return Tally(counts, trail.lost_through(), damaged)  # asked last, for what was pruned meanwhile


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        message = f"there is no room for temporary files ({error}): SQLITE_TMPDIR may name another directory"
        raise OutboxError(message) from error


def _look(trail: Trail, period: Period, low: int, high: int) -> tuple[dict[tuple[str, str, str], int], int]:
    """Return what users did in a range of numbers, and how many activities are damaged."""
    unanswered = {
        activity_id
        for activity_id, reason in trail.attempted(low, high, period)
        if isinstance(reason, str) and may_have_counted(reason)
    }
    did: dict[tuple[str, str, str], int] = defaultdict(int)
    damaged = 0
    for one in trail.relevant(low, high, period.start):
        if one.state is State.DAMAGED:
            damaged += 1
            continue
        what = _what(one, period)
        if one.id in unanswered:
            what |= _UNANSWERED
        if what:
            did[one.activity_type_id, one.billing_id, one.user_id] |= what
    return did, damaged


def _what(one: Traced, period: Period) -> int:
    recorded = period.start <= one.recorded_at <= period.end
    what = _RECORDED if recorded else 0
    if one.state is not State.ACCEPTED or one.settled_at is None:
        return what | (_PENDING if one.state is State.PENDING else _REJECTED) if recorded else what
    answered, sent = one.settled_at, one.settled_at - (one.duration_ms or 0)
    if sent > period.end_at_most:
        return what | _LATE if recorded else what
    if answered < period.start:
        return what
    if one.recorded_at < period.start <= sent:
        what |= _LATE
    if answered <= period.end:
        what |= _DELIVERED
    return what | (_ARRIVED if sent >= period.start and answered <= period.end else _STRADDLED)
