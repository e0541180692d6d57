"""The audit trail of an outbox in a database: what became of each activity, in the order of its number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perqueue._activity import State
from perqueue._outbox.postgres.connection import LONG_PATIENCE
from perqueue._outbox.postgres.session import Session
from perqueue._outbox.trail import SlicedTrail, Traced, Try

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Self

    from perqueue._address import DatabaseURL
    from perqueue._outbox.open import Relevant
    from perqueue._outbox.trail import Filter

_SLICE = 5000
_COLUMNS = (
    "id, billing_id, user_id, activity_type_id, {} AS state, recorded_at, {} AS settled_at, tries,"
    " {} AS transaction_id, reason, {} AS duration_ms"
)
_ALL = (
    f"(SELECT {_COLUMNS.format('0', 'NULL::bigint', 'NULL', 'NULL::int')} FROM perqueue_pending UNION ALL"
    f" SELECT {_COLUMNS.format('state', 'settled_at', 'transaction_id', 'duration_ms')}"
    " FROM perqueue_settled) a"
)
_TRACE = f"SELECT * FROM {_ALL} WHERE id BETWEEN %s AND %s{{}} ORDER BY id LIMIT %s"
_RELEVANT = (
    "SELECT id, activity_type_id, billing_id, user_id, recorded_at, state, settled_at, duration_ms"
    f" FROM {_ALL} WHERE id BETWEEN %s AND %s"
    " AND (recorded_at >= %s OR settled_at >= %s OR settled_at IS NULL) ORDER BY id"
)
_ATTEMPTED = (
    "SELECT activity_id, reason FROM perqueue_attempt"
    " WHERE activity_id BETWEEN %s AND %s AND attempted_at <= %s AND attempted_at + duration_ms >= %s"
)
_ATTEMPTS = (
    "SELECT attempted_at, duration_ms, reason FROM perqueue_attempt WHERE activity_id = %s ORDER BY id"
)
_ENDS = f"SELECT coalesce(min(id), 1), coalesce(max(id), 0) FROM {_ALL}"
_TIME = f"SELECT id, recorded_at FROM {_ALL} WHERE id >= %s ORDER BY id LIMIT 1"
_NEXT = f"SELECT min(id), max(id) FROM (SELECT id FROM {_ALL} WHERE id > %s ORDER BY id LIMIT %s) few"


class PostgresTrail(Session, SlicedTrail):
    """Reads an outbox in a database, a slice at a time: no read lasts long enough to hold up vacuum."""

    _patience = LONG_PATIENCE

    def __init__(self, url: DatabaseURL) -> None:
        super().__init__(url, None, create=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, wanted: Filter, low: int, high: int, limit: int) -> Iterator[Traced]:
        filters, values = wanted.sql("%s")
        return map(_traced, self._rows(_TRACE.format(filters), (low, high, *values, limit)))

    def _tries(self, activity_id: int) -> list[Try]:
        return [Try(*row) for row in self._rows(_ATTEMPTS, (activity_id,))]

    def _ends(self) -> tuple[int, int]:
        first, last = self._row(_ENDS)
        return first, last

    def _recorded_from(self, number: int) -> tuple[int, int] | None:
        return next(((at, recorded_at) for at, recorded_at in self._rows(_TIME, (number,))), None)

    def relevant(self, low: int, high: int, start: int) -> Iterator[Relevant]:
        """Yield the activities of a range of numbers that a period from ``start`` on may concern."""
        for number, kind, billing_id, user_id, recorded_at, state, settled_at, took in self._rows(
            _RELEVANT, (low, high, start, start)
        ):
            yield number, (kind, billing_id, user_id), recorded_at, State(state), settled_at, took or 0

    def attempted(self, low: int, high: int, since: int, until: int) -> list[tuple[int, str]]:
        """Return activity and reason of every request between two times that brought no acceptance."""
        return self._rows(_ATTEMPTED, (low, high, until, since))

    def lost_through(self) -> int:
        """Return until when settled activities may have been deleted (milliseconds since the epoch)."""
        return int(self._row("SELECT trail_lost_through FROM perqueue_outbox")[0])

    def slices(self, after: int, through: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of numbers, both ends included, that hold all activities above ``after``, in order."""
        while after < through:
            low, high = self._row(_NEXT, (after, _SLICE))
            if low is None or low > through:
                return
            after = min(high, through)
            yield low, after


def _traced(row: Sequence[Any]) -> Traced:
    number, billing_id, user_id, kind, state, recorded_at, settled_at, tries, transaction, reason, took = row
    return Traced(
        id=number,
        billing_id=billing_id,
        user_id=user_id,
        activity_type_id=kind,
        state=State(state),
        recorded_at=recorded_at,
        settled_at=settled_at,
        attempts=tries,
        transaction_id=transaction,
        reason=reason,
        duration_ms=took,
    )
