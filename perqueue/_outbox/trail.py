"""The audit trail: what became of each activity, in the order of recording.

Backends read it a range of numbers at a time, so that nobody who writes has to wait.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from perqueue._activity import State

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CLOCK_SLACK_MS = 86_400_000
"""How far the wall clock may have been set back: numbers grow with time, but for that."""


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


class SlicedTrail:
    """Reads the trail of an outbox a range of numbers at a time; how a range is read is the backend's."""

    def slices(self, after: int, through: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of numbers, both ends included, that hold all activities above ``after``, in order."""
        raise NotImplementedError

    def _read(self, wanted: Filter, low: int, high: int, limit: int) -> Iterable[Traced]:
        """Return activities of a range, oldest first, up to a limit."""
        raise NotImplementedError

    def _tries(self, activity_id: int) -> list[Try]:
        """Return the requests for an activity that have not settled it."""
        raise NotImplementedError

    def _ends(self) -> tuple[int, int]:
        """Return the lowest and the highest number there is; 1 and 0 if there is none."""
        raise NotImplementedError

    def _recorded_from(self, number: int) -> tuple[int, int] | None:
        """Return number and time of the first that is legible from a number on, if there is one near it."""
        raise NotImplementedError

    def trace(self, wanted: Filter, after: int, limit: int) -> list[Traced]:
        """Return activities above an ID, oldest first, up to a limit."""
        found: list[Traced] = []
        first, last = self.bounds(wanted.since, wanted.until)
        for low, high in self.slices(max(after, first - 1), last):
            found += self._read(wanted, low, high, limit - len(found))
            if len(found) >= limit:
                break
        return found

    def trace_one(self, activity_id: int) -> tuple[Traced, list[Try]] | None:
        """Return one activity and every request for it; None if there is none of this number."""
        one = next(iter(self._read(Filter(), activity_id, activity_id, 1)), None)
        if one is None:
            return None
        tries = self._tries(activity_id)
        if one.state in (State.ACCEPTED, State.REJECTED, State.DISCARDED):
            took = one.duration_ms or 0
            tries.append(Try((one.settled_at or 0) - took, took, one.reason))
        return one, tries

    def slices_until(self, until: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of numbers, both ends included, that hold all that was recorded before a time."""
        first, last = self.bounds(None, until)
        yield from self.slices(first - 1, last)

    def bounds(self, since: int | None, until: int | None) -> tuple[int, int]:
        """Return numbers between which all lie that were recorded since one time and before another.

        Exact as long as no clock was ever wrong by more than :data:`CLOCK_SLACK_MS`.
        """
        first, last = self._ends()
        if since is not None:
            first = self._search(since - CLOCK_SLACK_MS, first, last, late=False)
        if until is not None:
            last = self._search(until + CLOCK_SLACK_MS, first, last, late=True)
        return first, last

    def _search(self, moment: int, low: int, high: int, *, late: bool) -> int:
        """Return a number below which one was recorded before a moment, and from which on one was not.

        ``late`` says on which side to err where nothing legible is found.
        """
        while low < high:
            middle = (low + high) // 2
            found = self._recorded_from(middle)
            if late if found is None else found[1] < moment:
                low = (middle if found is None else found[0]) + 1
            else:
                high = middle
        return low


def legible(text: object) -> str | None:
    """Return a stored text so that it can be printed, even if it is damaged."""
    if text is None or (isinstance(text, str) and text.isascii()):
        return text
    raw = text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "backslashreplace")
