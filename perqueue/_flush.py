"""One flush: what it waits for, until when, and what it raises."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue import _threads
from perqueue._receipt import check_epoch, pause_error
from perqueue._settings import checked_timeout
from perqueue.exceptions import ActivityRejected, FlushTimeout, OutboxError, QueueClosed

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._outbox import Outbox, Position
    from perqueue._receipt import Waiters

_MOST_NAMED = 100
_COUNT_LIMIT = 10_000


class Default:
    """Stands for "the queue's own timeout", since None means no limit."""


DEFAULT = Default()


class Told:
    """Which of the outbox's bad news a queue's flushes have raised."""

    def __init__(self, position: Position, epoch: int = 0) -> None:
        self.begin(position, epoch)

    def begin(self, position: Position, epoch: int) -> None:
        """Begin anew, in an outbox as it stands."""
        self.epoch = epoch
        """How often the outbox had gone back then."""
        self.rejections = position.rejections
        """The number of the latest refusal that was raised."""
        self.damaged = position.damaged - position.missing
        """How many damaged rows were raised, or were known before; what is missing nobody has been told."""


class Flush:
    """One flush under way, of everything that is pending when it is made.

    It ends with :class:`QueueClosed` once ``closed`` says so.
    """

    def __init__(
        self,
        outbox: Outbox,
        told: Told,
        timeout: float | None,
        *,
        closed: Callable[[], bool],
        nudge: Callable[[], object],
        why_pending: Callable[[], str],
    ) -> None:
        self._closed = closed
        self._outbox = outbox
        self._told = told
        self._timeout = timeout = checked_timeout("timeout", timeout)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._nudge: Callable[[], object] | None = nudge
        self._why_pending = why_pending
        position = outbox.position()
        self._epoch = outbox.epoch
        if told.epoch != self._epoch:  # the numbers begin anew
            told.begin(position, self._epoch)
        self._target = position.last_id
        self._pauses = position.pauses
        # As they are now: of several flushes at a time, each raises what happens to it.
        self._rejections, self._damaged = told.rejections, told.damaged

    def run(self, waiters: Waiters) -> None:
        """Wait, in this thread, until everything is settled; raise if that was no acceptance, or is late."""
        happened = _threads.new_event()

        def listen(_: object) -> None:
            happened.set()

        waiters.add(None, listen)
        try:
            while not self._done():
                happened.wait(self._next_look())
                happened.clear()
        finally:
            waiters.remove(None, listen)

    async def arun(self, waiters: Waiters) -> None:
        """Do as :meth:`run`, without blocking the event loop."""
        import asyncio  # whoever awaits has it loaded

        loop = asyncio.get_running_loop()
        happened = asyncio.Event()

        def listen(_: object) -> None:
            with suppress(RuntimeError):  # that loop was closed: nobody waits any more
                loop.call_soon_threadsafe(happened.set)

        waiters.add(None, listen)
        try:
            while not self._done():
                alarm = loop.call_later(self._next_look(), happened.set)
                await happened.wait()
                alarm.cancel()
                happened.clear()
        finally:
            waiters.remove(None, listen)

    def _done(self) -> bool:
        if self._closed():
            message = "the queue was closed while flushing; what is undelivered stays in the outbox"
            raise QueueClosed(message)
        position = self._position()
        while position.oldest_pending is None or position.oldest_pending[0] > self._target:
            if position.rejections == self._rejections:
                self._raise_damage(position)
                return True
            self._raise_refusals(position)
            position = self._position()  # some that were refused may be pending again
        paused = pause_error(position.hold, self._pauses)
        if paused is not None:
            raise paused
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise self._timed_out()
        if self._nudge is not None:
            self._nudge()
            self._nudge = None
        return False

    def _position(self) -> Position:
        position = self._outbox.position()
        check_epoch(self._epoch, self._outbox.epoch)
        return position

    def _next_look(self) -> float:
        """Return the seconds until the next look, if nothing happens before."""
        left = 0.5 if self._deadline is None else self._deadline - time.monotonic()
        return min(0.5, max(0.0, left))

    def _raise_refusals(self, position: Position) -> None:
        """Raise :class:`ActivityRejected` for those that came since; none, if they are rejected no longer."""
        rejected = self._outbox.rejected_since(self._rejections, _MOST_NAMED)
        self._rejections = position.rejections
        self._told.rejections = max(self._told.rejections, position.rejections)
        if rejected:
            many = f"{_MOST_NAMED} or more" if len(rejected) == _MOST_NAMED else str(len(rejected))
            reason = rejected[0].reason
            message = (
                f"Per refused {many} of the activities since the previous flush (first reason: {reason});"
                " they are kept: `perqueue rejected list`"
            )
            raise ActivityRejected(message, reason=reason, activities=rejected)

    def _raise_damage(self, position: Position) -> None:
        """Raise :class:`OutboxError` for rows that were found to be damaged since: Per has not got them."""
        found = position.damaged - self._damaged
        if found > 0:
            self._told.damaged = max(self._told.damaged, position.damaged)
            message = (
                f"{found} of the activities could not be delivered: their rows in the outbox are damaged;"
                " they are kept, and `perqueue doctor` says more"
            )
            raise OutboxError(message)

    def _count(self) -> tuple[int, bool]:
        """Return how many of those awaited are pending, in short time, and whether there may be more."""
        counted = self._outbox.count_pending(self._target, _COUNT_LIMIT)
        if counted < _COUNT_LIMIT:
            return counted, False
        position = self._outbox.position()
        later = max(0, position.last_id - self._target)  # of these, some may be delivered already
        return max(counted, position.pending - later), later > 0

    def _timed_out(self) -> FlushTimeout:
        pending, more = self._count()
        reason = self._why_pending()
        oldest = self._outbox.position().oldest_pending
        failure = self._outbox.last_reason(oldest[0]) if oldest else None
        if failure is not None and failure not in reason:
            reason = f"{reason}; the oldest one's latest attempt: {failure}"
        many = "at least " if more else ""
        what = "activity is" if pending == 1 else "activities are"
        message = f"{many}{pending} {what} not accepted after {self._timeout:g} s, and kept ({reason})"
        return FlushTimeout(message, pending=pending, reason=reason)
