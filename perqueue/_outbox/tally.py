"""Counting unique users of a period, however many there are.

What each user did is gathered in a database of its own, on disk where memory does not suffice, which is
gone when it is closed.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

from perqueue._activity import State
from perqueue._answers import may_have_counted
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from perqueue._outbox.open import Trail

    Key = tuple[str, str, str]

_TABLE = (
    "CREATE TABLE did (kind TEXT, billing_id TEXT, user_id TEXT, what INTEGER,"
    " PRIMARY KEY (kind, billing_id, user_id)) WITHOUT ROWID"
)
_ADD = "INSERT INTO did VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET what = what | excluded.what"


_MOST_GATHERED = 50_000
"""Users whose doings are kept in memory before they are stored: most are active again and again."""
_ROUNDING_MS = 1
"""How far a stored time and a duration, in whole milliseconds, may lie beside the moment of sending."""


class Period(NamedTuple):
    """From when to when, both included, in milliseconds since the epoch."""

    start: int
    end: int
    """What arrived later is not in it for certain."""
    end_at_most: int
    """Later than ``end`` if the report was made before the period was over: between the two, who knows."""
    is_over: bool = True
    """Whether the period had ended when the report was made; otherwise its end is that moment."""
    tolerance: int = 0
    """How far Per's clock may differ from the one of the outbox."""


# What a user's activities of one type did, as far as a period is concerned. Plain numbers: an
# enumeration's operators cost more than all the rest of counting.
_RECORDED = 1
"""Was recorded in it."""
_DELIVERED = 2
"""Was accepted in it, by the time of Per's answer."""
_ARRIVED = 4
"""Was sent and accepted in it, and not at its very edge: Per has it in there."""
_POSSIBLE = 8
"""Was accepted, and not certainly outside: Per may have it in there."""
_STRADDLED = 16
"""Was sent on one side of a boundary and accepted on the other."""
_AT_THE_EDGE = 32
"""Was sent and accepted on one side of a boundary, but so near that the clocks decide on which."""
_UNANSWERED = 64
"""Was sent in it without an answer: Per may have counted it."""
_LATE = 128
"""Was recorded before a boundary of it and sent after that."""
_PENDING = 256
_REJECTED = 512

_KINDS = {"late": _LATE, "uncertain": _STRADDLED, "pending": _PENDING, "rejected": _REJECTED}
"""What makes a single activity worth a look, by the name of its column."""
_NOTABLE = _LATE | _STRADDLED | _PENDING | _REJECTED

_SHOWN = (
    _RECORDED,
    _DELIVERED,
    _LATE,
    _STRADDLED,
    _PENDING,
    _REJECTED,
    _ARRIVED,
    _POSSIBLE | _UNANSWERED,
    _UNANSWERED,
    _AT_THE_EDGE,
)
_BOTH = _RECORDED | _DELIVERED
_COUNT = (
    f"SELECT kind, billing_id, {', '.join(f'count(nullif(what & {flags}, 0))' for flags in _SHOWN)},"
    f" sum(what & {_BOTH} = {_BOTH}) FROM did GROUP BY kind, billing_id"
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
    at_the_edge: int = 0
    """Users with an activity that the clocks put on one side of a boundary, if they are right."""
    both: int = 0
    """Users that were recorded and delivered."""


class Notebook(Protocol):
    """Takes note of the single activities that are worth a look."""

    def begin(self) -> None:
        """Forget what was noted: the outbox is read from its beginning."""

    def note(self, activity_id: int, key: tuple[str, str], recorded_at: int, kind: str) -> None:
        """Note one of an activity type and billing ID, in the order of recording, and what it is."""


class Tally(NamedTuple):
    """What an outbox knows of a period."""

    counts: list[Count]
    lost_through: int
    """Settled activities up to this time may have been deleted (milliseconds since the epoch)."""
    damaged: int
    """Activities that cannot be counted, because nobody knows whose they are."""


def tally(trail: Trail, period: Period, notebook: Notebook | None = None) -> Tally:
    """Count what concerns a period, and note what is late, uncertain, pending or rejected.

    Raises :class:`~perqueue.OutboxError`, also if there is no room for what does not fit into memory.
    """
    if notebook is not None:
        notebook.begin()
    damaged = 0
    did: dict[Key, int] = defaultdict(int)
    with _room(), closing(sqlite3.connect("", isolation_level=None)) as gathered:
        for pragma in ("journal_mode = OFF", "cache_size = -65536"):
            gathered.execute(f"PRAGMA {pragma}")
        gathered.execute(_TABLE)
        for low, high in trail.slices_until(period.end_at_most + period.tolerance + 2 * _ROUNDING_MS):
            damaged += _look(trail, period, (low, high), did, notebook)
            if len(did) >= _MOST_GATHERED:
                _store(gathered, did)
                did.clear()
        _store(gathered, did)
        counts = [Count(*row) for row in gathered.execute(_COUNT)]
    return Tally(counts, trail.lost_through(), damaged)  # asked last, for what was pruned meanwhile


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        message = f"there is no room for temporary files ({error}): SQLITE_TMPDIR may name another directory"
        raise OutboxError(message) from error


def _store(gathered: sqlite3.Connection, did: Mapping[Key, int]) -> None:
    gathered.execute("BEGIN")
    gathered.executemany(_ADD, [(*key, what) for key, what in did.items()])
    gathered.execute("COMMIT")


def _look(
    trail: Trail,
    period: Period,
    numbers: tuple[int, int],
    did: dict[Key, int],
    notebook: Notebook | None,
) -> int:
    """Add what users did in a range of numbers, and return how many activities are damaged."""
    certain = edges(period)
    unanswered = {
        activity_id
        for activity_id, reason in trail.attempted(*numbers, certain.earliest, certain.latest)
        if isinstance(reason, str) and may_have_counted(reason)
    }
    damaged = 0
    relevant = trail.relevant(*numbers, certain.earliest)
    for activity_id, key, recorded_at, state, answered, duration in relevant:
        if state is State.DAMAGED:
            damaged += 1
            continue
        what = _RECORDED if period.start <= recorded_at <= period.end else 0
        if state is State.ACCEPTED:
            what |= _arrival(period, certain, recorded_at, answered, duration)
        elif what:
            what |= _PENDING if state is State.PENDING else _REJECTED
        if notebook is not None and what & _NOTABLE:
            name = next(name for name, flag in _KINDS.items() if what & flag)
            notebook.note(activity_id, key[:2], recorded_at, name)
        if activity_id in unanswered:
            what |= _UNANSWERED
        if what:
            did[key] |= what
    return damaged


class Edges(NamedTuple):
    """Between which moments an activity was certainly in a period, and beyond which it was certainly not."""

    earliest: int
    first: int
    last: int
    latest: int


def edges(period: Period) -> Edges:
    """Return them; only of a report's own moment do the clocks need no tolerance."""
    before = _ROUNDING_MS + period.tolerance
    after = _ROUNDING_MS + (period.tolerance if period.is_over else 0)
    return Edges(period.start - before, period.start + before, period.end - after, period.end_at_most + after)


def _arrival(period: Period, certain: Edges, recorded_at: int, answered: int, duration: int) -> int:
    """Return where an accepted activity lies: it arrived between sending and answer."""
    start, end, end_at_most, is_over, _ = period
    sent = answered - duration
    if certain.first <= sent and answered <= certain.last:
        return _DELIVERED | _ARRIVED | _POSSIBLE | (_LATE if recorded_at < start else 0)
    what = _POSSIBLE if certain.earliest <= answered and sent <= certain.latest else 0
    if start <= answered and sent <= end_at_most:
        what |= _DELIVERED if answered <= end else 0
        what |= _LATE if recorded_at < start <= sent else 0
        what |= _AT_THE_EDGE if start <= sent and answered <= end else _STRADDLED
    elif what:
        what |= _AT_THE_EDGE
    if sent > end_at_most and start <= recorded_at <= end:
        what |= _LATE if is_over else _PENDING  # it was, when the report was made
    return what
