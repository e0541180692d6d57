"""One flush: what it waits for, until when, and what it raises."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from perqueue._receipt import pause_error
from perqueue._settings import checked_timeout
from perqueue.exceptions import ActivityRejected, FlushTimeout

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._outbox import Outbox

_MOST_NAMED = 100
_COUNT_LIMIT = 100_000


class Default:
    """Stands for "the queue's own timeout", since None means no limit."""


DEFAULT = Default()


class Rejections:
    """How many of the outbox's refusals a queue's flushes have raised."""

    def __init__(self, seen: int) -> None:
        self._seen = seen

    def check(self, outbox: Outbox, rejections: int) -> bool:
        """Raise :class:`ActivityRejected` for those that came since, once.

        Returns whether there were none. False: those that there were are rejected no longer.
        """
        if rejections <= self._seen:
            return True
        rejected = outbox.rejected_since(self._seen, _MOST_NAMED)
        self._seen = max(self._seen, rejections)
        if rejected:
            many = f"{_MOST_NAMED} or more" if len(rejected) == _MOST_NAMED else str(len(rejected))
            reason = rejected[0].reason
            message = (
                f"Per refused {many} of the activities since the previous flush (first reason: {reason});"
                " they are kept: `perqueue rejected list`"
            )
            raise ActivityRejected(message, reason=reason, activities=rejected)
        return False


class Flush:
    """One flush under way, of everything that is pending when it is made."""

    def __init__(
        self,
        outbox: Outbox,
        rejections: Rejections,
        timeout: float | None,
        *,
        nudge: Callable[[], object],
        why_pending: Callable[[], str],
    ) -> None:
        self._outbox = outbox
        self._rejections = rejections
        self._timeout = checked_timeout("timeout", timeout)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._nudge: Callable[[], object] | None = nudge
        self._why_pending = why_pending
        position = outbox.position()
        self._target = position.last_id
        self._pauses = position.pauses

    def done(self) -> bool:
        """Tell whether everything is settled; raise if that was a refusal, or cannot be in time."""
        position = self._outbox.position()
        while position.oldest_pending is None or position.oldest_pending[0] > self._target:
            if self._rejections.check(self._outbox, position.rejections):
                return True
            position = self._outbox.position()  # some that were refused may be pending again
        paused = pause_error(position.hold, self._pauses)
        if paused is not None:
            raise paused
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise self._timed_out()
        if self._nudge is not None:
            self._nudge()
            self._nudge = None
        return False

    def wait(self) -> float:
        """Return the seconds until the next look, if nothing happens before."""
        left = 0.5 if self._deadline is None else self._deadline - time.monotonic()
        return min(0.5, max(0.0, left))

    def _timed_out(self) -> FlushTimeout:
        pending = self._outbox.count_pending(self._target, _COUNT_LIMIT)
        reason = self._why_pending()
        oldest = self._outbox.position().oldest_pending
        failure = self._outbox.last_reason(oldest[0]) if oldest else None
        if failure is not None and failure not in reason:
            reason = f"{reason}; the oldest one's latest attempt: {failure}"
        many = "at least " if pending >= _COUNT_LIMIT else ""
        what = "activity is" if pending == 1 else "activities are"
        message = f"{many}{pending} {what} not accepted after {self._timeout:g} s, and kept ({reason})"
        return FlushTimeout(message, pending=pending, reason=reason)
