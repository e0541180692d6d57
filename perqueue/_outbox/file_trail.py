"""The audit trail of an outbox file, as :class:`perqueue._outbox.open.Trail` has it.

Nothing is told that is not what was stored: a row or an outcome whose checksum does not fit is damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perqueue._activity import State, checksum
from perqueue._outbox.damage import is_sound
from perqueue._outbox.reader import Reader
from perqueue._outbox.trail import SlicedTrail, Traced, Try, legible

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from perqueue._outbox.open import Relevant
    from perqueue._outbox.trail import Filter

_PROBE = 8
"""Rows among which a search by time looks for one that is sound."""

_COLUMNS = (
    "a.id, a.billing_id, a.user_id, a.activity_type_id, a.recorded_at, a.checksum,"
    " s.activity_id, s.state, s.settled_at, s.transaction_id, s.reason, s.checksum, s.duration_ms"
)
_TABLES = "perqueue_activity a LEFT JOIN perqueue_settlement s ON s.activity_id = a.id"
STORED = f"SELECT {_COLUMNS} FROM {_TABLES}"
"""What :func:`state_of` judges, and how long the request took that settled it."""
TRACE = (
    f"SELECT {_COLUMNS},"
    " coalesce(s.attempts, (SELECT count(*) FROM perqueue_attempt t WHERE t.activity_id = a.id)),"
    " CASE WHEN s.activity_id IS NULL THEN (SELECT t.reason FROM perqueue_attempt t"
    f" WHERE t.activity_id = a.id ORDER BY t.id DESC LIMIT 1) END FROM {_TABLES}"
)
_SLICE = f"{TRACE} WHERE a.id BETWEEN ? AND ?{{filters}} ORDER BY a.id LIMIT ?"
_TIMES = (
    "SELECT id, billing_id, user_id, activity_type_id, recorded_at, checksum"
    f" FROM perqueue_activity WHERE id >= ? ORDER BY id LIMIT {_PROBE}"
)
_ENDS = (
    "SELECT coalesce((SELECT min(id) FROM perqueue_activity), 1),"
    " coalesce((SELECT max(id) FROM perqueue_activity), 0)"
)
_ATTEMPTS = (
    "SELECT attempted_at, duration_ms, reason FROM perqueue_attempt WHERE activity_id = ? ORDER BY id LIMIT ?"
)
_MOST_ATTEMPTS = 100_000
_ORIGIN = "SELECT origin FROM perqueue_outbox"
_LOST = "SELECT trail_lost_through FROM perqueue_drain"
# Of what was recorded long before, most was settled long before: those are left out by SQLite itself.
_RELEVANT = (
    f"{STORED} WHERE a.id BETWEEN ? AND ? AND (a.recorded_at >= ? OR s.settled_at >= ?"
    " OR s.activity_id IS NULL) ORDER BY a.id"
)
_ATTEMPTED = (
    "SELECT activity_id, reason FROM perqueue_attempt"
    " WHERE activity_id BETWEEN ? AND ? AND attempted_at <= ? AND attempted_at + duration_ms >= ?"
)
_STATES = tuple(State)  # by their numbers: several times as fast as State(number)


class FileTrail(Reader, SlicedTrail):
    """Reads the trail of a file."""

    def origin(self) -> str | None:
        """Return whose Per the outbox belongs to; None before that is known."""
        ((origin,),) = self.rows(_ORIGIN)
        return None if origin is None else str(origin)

    def _read(self, wanted: Filter, low: int, high: int, limit: int) -> Iterator[Traced]:
        filters, values = wanted.sql()
        return map(traced, self.rows(_SLICE.format(filters=filters), (low, high, *values, limit)))

    def _tries(self, activity_id: int) -> list[Try]:
        rows = self.rows(_ATTEMPTS, (activity_id, _MOST_ATTEMPTS))
        return [Try(_number(at), _number(took), legible(reason)) for at, took, reason in rows]

    def _ends(self) -> tuple[int, int]:
        first, last = self.rows(_ENDS)[0]
        return first, last

    def _recorded_from(self, number: int) -> tuple[int, int] | None:
        sound = (row for row in self.rows(_TIMES, (number,)) if is_as_recorded(row[1:6]))
        return next(((row[0], row[4]) for row in sound), None)

    def relevant(self, low: int, high: int, start: int) -> Iterator[Relevant]:
        """Yield the activities of a range of numbers that a period from ``start`` on may concern."""
        for row in self.rows(_RELEVANT, (low, high, start, start)):
            number, billing_id, user_id, kind, recorded_at = row[:5]
            yield number, (kind, billing_id, user_id), recorded_at, state_of(row), row[8], _sound(row[12])

    def attempted(self, low: int, high: int, since: int, until: int) -> list[tuple[int, object]]:
        """Return activity and reason of every request between two times that brought no acceptance."""
        rows = self.rows(_ATTEMPTED, (low, high, until, since))
        return [(activity_id, reason) for activity_id, reason in rows]

    def lost_through(self) -> int:
        """Return until when settled activities may have been deleted (milliseconds since the epoch)."""
        ((lost,),) = self.rows(_LOST)
        return int(lost)


def traced(row: Sequence[Any]) -> Traced:
    """Turn a row of the query into what may be told of it."""
    outcome, (duration, attempts, waiting_for) = row[6:12], row[12:15]
    state, settled_at, transaction_id, reason = State.PENDING, None, None, waiting_for
    if outcome[0] is not None:
        if is_sound(outcome):
            state, settled_at, transaction_id, reason = State(outcome[1]), *outcome[2:5]
        else:
            state, reason = State.DAMAGED, "the stored outcome does not match its checksum"
    if state is not State.DAMAGED and not is_as_recorded(row[1:6]):
        state, reason = State.DAMAGED, "the stored row does not match its checksum"
    return Traced(
        id=row[0],
        billing_id=legible(row[1]) or "",
        user_id=legible(row[2]) or "",
        activity_type_id=legible(row[3]) or "",
        state=state,
        recorded_at=_number(row[4]),
        settled_at=settled_at,
        attempts=_number(attempts),
        transaction_id=legible(transaction_id),
        reason=legible(reason),
        duration_ms=_number(duration),
    )


def state_of(row: Sequence[Any]) -> State:
    """Return the state of a row of :data:`STORED`: damaged, if anything in it is not what was stored."""
    if not is_as_recorded(row[1:6]):
        return State.DAMAGED
    if row[6] is None:
        return State.PENDING
    return _STATES[row[7]] if is_sound(row[6:12]) else State.DAMAGED


def is_as_recorded(row: Sequence[Any]) -> bool:
    """Tell whether billing ID, user ID, activity type, time and checksum are those that were stored."""
    billing_id, user_id, kind, recorded_at, check = row
    if not (
        isinstance(recorded_at, int)
        and isinstance(billing_id, str)
        and isinstance(user_id, str)
        and isinstance(kind, str)
    ):
        return False
    return bool(check == checksum(billing_id, user_id, kind, recorded_at))


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _sound(duration: object) -> int:
    return max(0, duration) if isinstance(duration, int) else 0  # no checksum covers it
