"""The end of a queue: by close(), by leaving a block, with the interpreter; and what a fork ends."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from perqueue import _ending, _fork, _threads
from perqueue._receipt import Waiters
from perqueue._waiting import Waiting
from perqueue.exceptions import PerQueueError, QueueClosed

if TYPE_CHECKING:
    import threading
    import weakref
    from types import TracebackType
    from typing import Any, Self

    from perqueue._client import Reporter

log = logging.getLogger("perqueue")


class Lifetime(Waiting):
    """The part of :class:`perqueue.PerQueue` that ends it."""

    _close_lock: threading.RLock
    _finalizer: weakref.finalize[..., Any]
    _reporter: Reporter

    def close(self) -> None:
        """Stop; what is not delivered stays on disk for the next start.

        Requests in flight get ``exit_timeout`` seconds to be answered. Idempotent, from any thread.
        """
        self._close(self._settings.exit_timeout)

    async def aclose(self) -> None:
        """Do as :meth:`close`, without blocking the event loop."""
        import asyncio

        await asyncio.to_thread(self.close)

    def _close(self, grace: float) -> None:
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
        _fork.withdraw(self)
        _ending.closed(self)
        self._finalizer.detach()
        worker = self._worker
        if worker is not None and _threads.is_current(worker.thread):
            # From a callback: the thread must end before the outbox is closed.
            _ending.end_elsewhere(self._outbox, worker, self._reporter, grace)
        else:
            _ending.end(self._outbox, worker, self._reporter, grace)
        error = QueueClosed("the queue was closed; what is undelivered stays in the outbox")
        self._observer.waiters.tell_all(error)

    def deliver_at_exit(self, began: float) -> None:
        """Deliver for what is left of ``exit_timeout``, then close; called when the interpreter exits."""
        deadline = began + self._settings.exit_timeout
        worker = self._worker
        try:
            if worker is not None and worker.started and self._settings.drain and not worker.standby:
                self.flush(max(0.0, deadline - time.monotonic()))
        except PerQueueError as error:
            log.debug("at exit: %s", error)
        self._close(max(0.0, deadline - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._flushes_on_leaving(kind):
                self.flush()
        except PerQueueError:
            if kind is None:
                raise
        finally:
            self.close()

    def _flushes_on_leaving(self, kind: type[BaseException] | None) -> bool:
        if self._closed or not (kind is None or issubclass(kind, Exception)):
            return False
        # A queue that only records can make nothing happen: it waits if another process delivers just now.
        return self._settings.drain or self._outbox.is_drained() is not False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._flushes_on_leaving(kind):
                await self.aflush()
        except PerQueueError:
            if kind is None:
                raise
        finally:
            await self.aclose()

    # -- around a fork, see perqueue._fork

    def before_fork(self) -> None:
        """Nothing to do: the outbox closes itself."""

    def after_fork_in_parent(self) -> None:
        """Nothing to do."""

    def after_fork_in_child(self) -> None:
        """Forget the parent's threads, and who waited in it."""
        self._close_lock = _threads.RLock()
        self._observer.waiters = Waiters()
        if self._worker is not None:
            self._worker.abandon()
