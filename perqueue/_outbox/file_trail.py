"""The audit trail of an outbox file, as :class:`perqueue._outbox.open.Trail` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perqueue._outbox.reader import Reader
from perqueue._outbox.trail import STORED, bounds, state_of, trace, trace_one

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._outbox.open import Relevant
    from perqueue._outbox.trail import Filter, Traced, Try

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


class FileTrail(Reader):
    """Reads the trail of a file."""

    def origin(self) -> str | None:
        """Return whose Per the outbox belongs to; None before that is known."""
        ((origin,),) = self.rows(_ORIGIN)
        return None if origin is None else str(origin)

    def trace(self, wanted: Filter, after: int, limit: int) -> list[Traced]:
        """Return activities above an ID, oldest first, up to a limit."""
        return trace(self, wanted, after, limit)

    def trace_one(self, activity_id: int) -> tuple[Traced, list[Try]] | None:
        """Return one activity and every request for it; None if there is none of this number."""
        return trace_one(self, activity_id)

    def slices_until(self, until: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of numbers, both ends included, that hold all that was recorded before a time."""
        first, last = bounds(self, None, until)
        yield from self.slices(first - 1, last)

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


def _sound(duration: object) -> int:
    return max(0, duration) if isinstance(duration, int) else 0  # no checksum covers it
