"""The audit trail: what became of each activity, in the order of recording.

Nothing is told that is not what was stored: a row or an outcome whose checksum does not fit is damaged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from perqueue._activity import State, checksum
from perqueue._outbox.damage import is_sound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perqueue._outbox.reader import Reader

CLOCK_SLACK_MS = 86_400_000
"""How far the wall clock may have been set back: numbers grow with time, but for that."""
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
_ONE = f"{TRACE} WHERE a.id = ?"
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
_STATES = tuple(State)  # by their numbers: several times as fast as State(number)


class Traced(NamedTuple):
    """One activity and what became of it. Times are in milliseconds since the epoch."""

    id: int
    billing_id: str
    user_id: str
    activity_type_id: str
    state: State
    recorded_at: int
    settled_at: int | None
    attempts: int
    transaction_id: str | None
    reason: str | None
    duration_ms: int | None
    """How long the request took that settled it."""


class Try(NamedTuple):
    """One request for one activity."""

    attempted_at: int
    duration_ms: int
    reason: str | None
    """Why it brought no acceptance; None if it did."""


class Filter(NamedTuple):
    """Which activities are asked for; None: all. Times are in milliseconds since the epoch."""

    billing_id: str | None = None
    user_id: str | None = None
    activity_type_id: str | None = None
    since: int | None = None
    """Recorded then or later."""
    until: int | None = None
    """Recorded before then."""

    def sql(self, value: str = "?") -> tuple[str, list[object]]:
        """Return conditions and their values; ``value`` stands for each of them."""
        columns = ("billing_id =", "user_id =", "activity_type_id =", "recorded_at >=", "recorded_at <")
        given = [*zip((f"{column} {value}" for column in columns), self, strict=True)]
        wanted = [(condition, value) for condition, value in given if value is not None]
        return "".join(f" AND a.{condition}" for condition, _ in wanted), [value for _, value in wanted]


def trace(reader: Reader, wanted: Filter, after: int, limit: int) -> list[Traced]:
    """Return activities above an ID, oldest first, up to a limit."""
    filters, values = wanted.sql()
    query = _SLICE.format(filters=filters)
    found: list[Traced] = []
    first, last = bounds(reader, wanted.since, wanted.until)
    for low, high in reader.slices(max(after, first - 1), last):
        rows = reader.rows(query, (low, high, *values, limit - len(found)))
        found += map(traced, rows)
        if len(found) >= limit:
            break
    return found


def trace_one(reader: Reader, activity_id: int) -> tuple[Traced, list[Try]] | None:
    """Return one activity and every request for it; None if there is none of this number."""
    row = reader.row(_ONE, (activity_id,))
    if row is None:
        return None
    one = traced(row)
    tries = [
        Try(_number(at), _number(took), legible(reason))
        for at, took, reason in reader.rows(_ATTEMPTS, (activity_id, _MOST_ATTEMPTS))
    ]
    if one.state in (State.ACCEPTED, State.REJECTED, State.DISCARDED):
        took = one.duration_ms or 0
        tries.append(Try((one.settled_at or 0) - took, took, one.reason))
    return one, tries


def bounds(reader: Reader, since: int | None, until: int | None) -> tuple[int, int]:
    """Return numbers between which all activities lie that were recorded since one time and before another.

    Exact as long as the clock was never set back by more than :data:`CLOCK_SLACK_MS`.
    """
    first, last = reader.rows(_ENDS)[0]
    if since is not None:
        first = _search(reader, since - CLOCK_SLACK_MS, first, last, late=False)
    if until is not None:
        last = _search(reader, until + CLOCK_SLACK_MS, first, last, late=True)
    return first, last


def _search(reader: Reader, moment: int, low: int, high: int, *, late: bool) -> int:
    """Return a number below which one was recorded before a moment, and from which on one was not.

    ``late`` says on which side to err where nothing legible is found.
    """
    while low < high:
        middle = (low + high) // 2
        sound = (row for row in reader.rows(_TIMES, (middle,)) if is_as_recorded(row[1:6]))
        number, *_, recorded_at, _ = next(sound, (middle, None, None))
        if late if recorded_at is None else recorded_at < moment:
            low = number + 1
        else:
            high = middle
    return low


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


def legible(text: object) -> str | None:
    """Return a stored text so that it can be printed, even if it is damaged."""
    if text is None or (isinstance(text, str) and text.isascii()):
        return text
    raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
