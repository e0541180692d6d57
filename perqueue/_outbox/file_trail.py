"""The audit trail of an outbox file, as :class:`perqueue._outbox.open.Trail` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perqueue._outbox.reader import Reader
from perqueue._outbox.tally import _ATTEMPTED, _RELEVANT
from perqueue._outbox.trail import bounds, trace, trace_one, traced

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._outbox.tally import Period
    from perqueue._outbox.trail import Filter, Traced, Try

_LOST = "SELECT trail_lost_through FROM perqueue_drain"


class FileTrail(Reader):
    """Reads the trail of a file."""

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

    def relevant(self, low: int, high: int, start: int) -> Iterator[Traced]:
        """Yield the activities of a range of numbers that a period from ``start`` on may concern."""
        return map(traced, self.rows(_RELEVANT, (low, high, start, start)))

    def attempted(self, low: int, high: int, period: Period) -> list[tuple[int, object]]:
        """Return activity and reason of every request in a period that brought no acceptance."""
        rows = self.rows(_ATTEMPTED, (low, high, period.end_at_most, period.start))
        return [(activity_id, reason) for activity_id, reason in rows]

    def lost_through(self) -> int:
        """Return until when settled activities may have been deleted (milliseconds since the epoch)."""
        ((lost,),) = self.rows(_LOST)
        return int(lost)
