"""Waiting for one activity, or for all of them: whoever waits is told by the drain, never the other way."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

from perqueue._activity import State
from perqueue.exceptions import (
    ActivityRejected,
    AuthenticationError,
    FlushTimeout,
    OutboxError,
    PerQueueError,
    QueueClosed,
)

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Generator

    from perqueue._outbox import Hold, Settled

    Listener = Callable[[Settled | Hold | PerQueueError | None], object]


class Waiters:
    """Who waits for which activity (or, under the key None, for anything to happen)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: dict[int | None, list[Listener]] = {}

    def add(self, activity_id: int | None, listener: Listener) -> None:
        """Have the listener called, on the drain's thread, with news; it must not block."""
        with self._lock:
            self._listeners.setdefault(activity_id, []).append(listener)

    def remove(self, activity_id: int | None, listener: Listener) -> None:
        """Stop calling the listener."""
        with self._lock:
            listeners = self._listeners.get(activity_id, [])
            if listener in listeners:
                listeners.remove(listener)
            if not listeners:
                self._listeners.pop(activity_id, None)

    def ids(self) -> list[int]:
        """Return the activities that somebody waits for."""
        with self._lock:
            return [key for key in self._listeners if key is not None]

    def any(self) -> bool:
        """Tell whether anybody waits for anything."""
        return bool(self._listeners)

    def settled(self, outcomes: dict[int, Settled]) -> None:
        """Tell those who wait for these, and those who wait for anything."""
        with self._lock:
            calls = [(listener, outcome) for i, outcome in outcomes.items() for listener in self._get(i)]
            general = self._get(None)
        for listener, outcome in calls:
            listener(outcome)
        for listener in general:
            listener(None)

    def tell_all(self, news: Hold | PerQueueError) -> None:
        """Tell everybody that the drain has paused, or that the queue is closed."""
        with self._lock:
            everybody = [listener for listeners in self._listeners.values() for listener in listeners]
        for listener in everybody:
            listener(news)

    def _get(self, key: int | None) -> list[Listener]:
        return list(self._listeners.get(key, ()))


class ReceiptOffice(Protocol):
    """What a receipt asks of its queue."""

    def _outcome(self, activity_id: int) -> Settled | None: ...

    def _watch(self, activity_id: int, listener: Listener) -> int:
        """Register, wake the drain, and return the number of the latest pause before this call."""

    def _unwatch(self, activity_id: int, listener: Listener) -> None: ...

    def _why_pending(self) -> str: ...


class Receipt:
    """Stands for one recorded activity; wait for it, await it, or let it go.

    It is cheap (a number and a weak reference), and dropping it changes nothing.
    """

    __slots__ = ("_error", "_office", "id")

    def __init__(
        self, activity_id: int, office: weakref.ref[ReceiptOffice], error: OutboxError | None = None
    ) -> None:
        self.id = activity_id
        """The activity's number in the outbox; 0 if it could not be stored."""
        self._office = office
        self._error = error

    def __repr__(self) -> str:
        return f"<Receipt {self.id}>"

    def _open(self) -> ReceiptOffice:
        if self._error is not None:
            raise self._error
        office = self._office()
        if office is None:
            message = "the queue of this receipt is gone; the activity itself is safe in the outbox"
            raise QueueClosed(message)
        return office

    def wait(self, timeout: float | None = 30.0) -> str:
        """Block until Per has accepted this activity, and return its transaction ID.

        ``timeout`` is in seconds; None waits without limit. Raises :class:`~perqueue.ActivityRejected`,
        :class:`~perqueue.AuthenticationError`, :class:`~perqueue.FlushTimeout` (it stays pending), or
        :class:`~perqueue.QueueClosed`. Works also when another process delivers it.
        """
        office = self._open()
        deadline = None if timeout is None else time.monotonic() + timeout
        news: list[Settled | Hold | PerQueueError | None] = []
        happened = threading.Event()

        def listen(what: Settled | Hold | PerQueueError | None) -> None:
            news.append(what)
            happened.set()

        pauses = office._watch(self.id, listen)  # noqa: SLF001
        try:
            done = office._outcome(self.id)  # noqa: SLF001
            if done is not None:
                return _transaction_id(done)
            while True:
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not happened.wait(left):
                    raise self._timed_out(office)
                happened.clear()
                while news:
                    result = judge(news.pop(0), pauses)
                    if result is not None:
                        return result
        finally:
            office._unwatch(self.id, listen)  # noqa: SLF001

    def __await__(self) -> Generator[object, None, str]:
        return self._wait_async().__await__()

    async def _wait_async(self, timeout: float = 30.0) -> str:
        import asyncio  # noqa: PLC0415 - whoever awaits has it loaded

        office = self._open()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str] = loop.create_future()
        pauses = 0

        def hear(what: Settled | Hold | PerQueueError | None) -> None:
            if answer.done():
                return
            try:
                result = judge(what, pauses)
            except PerQueueError as error:
                answer.set_exception(error)
            else:
                if result is not None:
                    answer.set_result(result)

        def listen(what: Settled | Hold | PerQueueError | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(hear, what)

        pauses = office._watch(self.id, listen)  # noqa: SLF001
        try:
            done = office._outcome(self.id)  # noqa: SLF001
            if done is not None:
                return _transaction_id(done)
            async with asyncio.timeout(timeout):
                return await answer
        except TimeoutError as error:
            if isinstance(error, PerQueueError):
                raise
            raise self._timed_out(office) from None
        finally:
            office._unwatch(self.id, listen)  # noqa: SLF001

    def _timed_out(self, office: ReceiptOffice) -> FlushTimeout:
        why = office._why_pending()  # noqa: SLF001
        return FlushTimeout(f"activity {self.id} is still pending: {why}", pending=1, reason=why)


def judge(news: Settled | Hold | PerQueueError | None, pauses: int) -> str | None:
    """Return the transaction ID, raise what a waiting caller must know, or return None to wait on."""
    if news is None:
        return None
    if isinstance(news, PerQueueError):
        raise news
    if hasattr(news, "state"):
        return _transaction_id(news)
    error = pause_error(news, pauses)
    if error is not None:
        raise error
    return None


def pause_error(hold: Hold | None, pauses: int) -> PerQueueError | None:
    """Return what to raise for a pause that a probe after the ``pauses``-th one has confirmed."""
    if hold is None or hold.number <= pauses:
        return None
    if hold.kind == "bad_token":
        message = f"Per refused the activity token ({hold.reason}): everything is kept, delivery is paused"
        return AuthenticationError(message, code=hold.reason)
    if hold.kind == "refused":
        message = f"Per refuses every activity ({hold.reason}): they are kept as pending, delivery is paused"
        return ActivityRejected(message, reason=hold.reason)
    return None


def _transaction_id(settled: Settled) -> str:
    if settled.state is State.ACCEPTED:
        return settled.transaction_id or ""
    if settled.state is State.DAMAGED:
        message = f"the activity's row in the outbox is damaged: {settled.reason}"
        raise OutboxError(message)
    message = f"Per refused the activity: {settled.reason}"
    raise ActivityRejected(message, reason=settled.reason)
