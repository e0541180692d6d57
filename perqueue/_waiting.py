"""Waiting until Per has it: what flush() and receipts ask of a queue."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from perqueue import _threads
from perqueue._flush import DEFAULT, Default, Flush, Told
from perqueue._stats import DrainState
from perqueue.exceptions import ActivityRejected, OutboxError, PerQueueError, QueueClosed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._coalescer import Coalescer
    from perqueue._delivery.worker import Worker
    from perqueue._observer import Observer
    from perqueue._outbox import Outbox, Settled
    from perqueue._receipt import Listener
    from perqueue._settings import Settings
    from perqueue._stats import Stats


class Waiting:
    """The part of :class:`perqueue.PerQueue` that waits for what others do."""

    _closed: bool
    _coalescer: Coalescer | None
    _observer: Observer
    _outbox: Outbox
    _settings: Settings
    _told: Told
    _worker: Worker | None

    def _refuse(self) -> NoReturn:
        message = "the queue is closed"
        raise QueueClosed(message)

    def _follower(self) -> Worker:
        raise NotImplementedError

    def stats(self) -> Stats:
        """Return counts and what the drain is doing."""
        raise NotImplementedError

    def flush(self, timeout: float | Default | None = DEFAULT) -> None:
        """Return once Per has accepted everything that is pending now.

        ``timeout`` is in seconds (default: ``flush_timeout``); None waits without limit. Raises
        :class:`~perqueue.FlushTimeout` (the rest stays in the outbox),
        :class:`~perqueue.AuthenticationError` at once if a fresh try shows that the token is refused,
        :class:`~perqueue.ActivityRejected` once for what Per has refused since the previous flush, or
        :class:`~perqueue.OutboxError`, also once for rows that were found to be damaged.
        """
        flush = self._new_flush(timeout)
        with self._forgetting():
            flush.run(self._observer.waiters)

    async def aflush(self, timeout: float | Default | None = DEFAULT) -> None:  # noqa: ASYNC109
        """Do as :meth:`flush`, without blocking the event loop."""
        flush = self._new_flush(timeout)
        with self._forgetting():
            await flush.arun(self._observer.waiters)

    def _new_flush(self, timeout: float | Default | None) -> Flush:
        self._not_from_callback()
        if self._closed:
            self._refuse()
        return Flush(
            self._outbox,
            self._told,
            self._settings.flush_timeout if isinstance(timeout, Default) else timeout,
            closed=lambda: self._closed,
            nudge=self._nudge,
            why_pending=self._why_pending,
        )

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """What is recorded after bad news stands for itself."""
        try:
            yield
        except (ActivityRejected, OutboxError):
            if self._coalescer is not None:
                self._coalescer.forget()
            raise

    def _nudge(self) -> None:
        self._follower().nudge()

    def _not_from_callback(self) -> None:
        worker = self._worker
        if worker is not None and _threads.is_current(worker.thread):
            message = "a perqueue callback must not wait: it runs on the thread that would end the wait"
            raise PerQueueError(message)

    # What a receipt asks (_receipt.ReceiptOffice)

    def _outcome(self, activity_id: int) -> Settled | None:
        return self._outbox.settled([activity_id]).get(activity_id)

    def _epoch(self) -> int:
        return self._outbox.epoch

    def _watch(self, activity_id: int, listener: Listener) -> int:
        self._not_from_callback()
        if self._closed:
            self._refuse()
        pauses = self._outbox.position().pauses
        self._observer.waiters.add(activity_id, listener)
        self._nudge()
        return pauses

    def _unwatch(self, activity_id: int, listener: Listener) -> None:
        self._observer.waiters.remove(activity_id, listener)

    def _why_pending(self) -> str:
        stats = self.stats()
        if stats.state is DrainState.OFF:
            return "this process only records; does one run that delivers (perqueue drain)?"
        return str(stats.state).replace("_", " ") + (f": {stats.reason}" if stats.reason else "")
