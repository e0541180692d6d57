"""Coroutines for synchronous callers: an event loop on a daemon thread of its own."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from perqueue import _fork, _threads
from perqueue._loop import DeliveryLoop
from perqueue.exceptions import PerAPIError, QueueClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    Call = Callable[[], Coroutine[Any, Any, Any]]

T = TypeVar("T")
_CLOSED = "the client is closed"
_abandoned: list[object] = []


class Background:
    """Runs any number of coroutines at a time; the thread starts with the first one.

    The caller may be inside an event loop itself, which blocks meanwhile.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._closed = False
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = _threads.RLock()  # a signal handler may come in between
        self._loop: DeliveryLoop | None = None
        self._end: asyncio.Future[None] | None = None
        self._thread: _threads.Thread | None = None
        self._pid = os.getpid()  # last: other threads of a child go on when it is right

    def adopt(self, forget: Callable[[], object]) -> None:
        """In a forked child, once: abandon the parent's loop, untouched, and ``forget`` what is its."""
        if self._pid == os.getpid():
            return
        with _fork.quiet:
            if self._pid != os.getpid():
                # Kept alive for good: a loop that is collected would end the registrations of an epoll
                # descriptor that both processes share.
                _abandoned.append((self._loop, self._thread))
                forget()
                self._start_afresh()

    def run(self, call: Callable[[], Coroutine[Any, Any, T]], last: Call) -> T:
        """Run a coroutine and return its result.

        ``last`` is awaited when the loop ends. Raises :class:`QueueClosed` if :meth:`close` came first,
        and :class:`PerAPIError` if the interpreter is shutting down and starts no thread any more.
        """
        with self._lock:
            if self._closed:
                raise QueueClosed(_CLOSED)
            loop = self._loop = self._loop or self._start(last)
            future = asyncio.run_coroutine_threadsafe(call(), loop)
        done = _threads.new_event()
        future.add_done_callback(lambda _: done.set())
        try:
            done.wait()
            return future.result()
        except CancelledError:
            raise QueueClosed(_CLOSED) from None
        except BaseException:
            future.cancel()  # a signal handler's exception; without effect on one that is done
            raise

    def _start(self, last: Call) -> DeliveryLoop:
        try:
            _threads.check_event_loops()
        except RuntimeError as error:
            raise PerAPIError(str(error)) from None
        loop = DeliveryLoop()
        self._end = loop.create_future()
        self._thread = _threads.new_thread(_serve, (loop, self._end, last), name=self._name)
        try:
            self._thread.start()
        except BaseException as error:
            loop.close()
            if isinstance(error, RuntimeError):
                message = f"nothing can be asked while the interpreter is shutting down: {error}"
                raise PerAPIError(message) from None
            raise
        return loop

    def close(self, wait: float = 0.0) -> None:
        """Cancel what is running and end the thread, which has ``wait`` seconds to do so; idempotent."""
        if self._pid != os.getpid():
            self._closed = True  # what the parent had open is the parent's
            return
        with self._lock:
            self._closed = True
            loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None and self._end is not None:
            with suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(self._end.set_result, None)
            if wait > 0 and not _threads.is_current(self._thread):
                self._thread.join(wait)


def _serve(loop: DeliveryLoop, end: asyncio.Future[None], last: Call) -> None:
    try:
        while not end.done():
            # A given transport's KeyboardInterrupt stops a loop; its caller is told once the loop goes on.
            with suppress(BaseException):
                loop.run_until_complete(end)
        loop.run_until_complete(_end(last))
    finally:
        loop.close()


async def _end(last: Call) -> None:
    running = asyncio.all_tasks() - {asyncio.current_task()}
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await last()
