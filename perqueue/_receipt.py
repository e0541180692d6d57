"""Waiting for one activity, or for all of them: whoever waits is told by the drain, never the other way."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from perqueue import _threads
from perqueue._activity import State
from perqueue._outbox import Hold, Settled
from perqueue._settings import checked_timeout
from perqueue._stats import Gate
from perqueue.exceptions import (
    ActivityRejected,
    AuthenticationError,
    FlushTimeout,
    OutboxError,
    PerQueueError,
    QueueClosed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Self

    News = Settled | Hold | PerQueueError | None
    Listener = Callable[[News], object]

_AWAIT_TIMEOUT = 30.0
_FIRST_LOOK = 0.5
_LAST_LOOK = 5.0
"""Seconds between two looks of one receipt into the outbox, at first and at most."""


class Waiters:
    """Who waits for which activity (or, under the key None, for anything to happen)."""

    def __init__(self) -> None:
        self._lock = _threads.RLock()  # a signal handler may wait while its thread is in here
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

    def _epoch(self) -> int:
        """Return how often numbers were taken back, as of the latest look into the outbox."""

    def _watch(self, activity_id: int, listener: Listener) -> int:
        """Register, wake the drain, and return the number of the latest pause before this call."""

    def _unwatch(self, activity_id: int, listener: Listener) -> None: ...

    def _why_pending(self) -> str: ...


class _Hearing:
    """One wait for one activity: what is heard of it, from the drain's thread, until there is a result."""

    def __init__(self, receipt: Receipt, office: ReceiptOffice, wake: Callable[[], object]) -> None:
        self._id = receipt.id
        self._epoch = receipt._epoch  # noqa: SLF001
        self._office = office
        self._wake = wake
        self._news: deque[News] = deque()

    def __enter__(self) -> Self:
        self._pauses = self._office._watch(self._id, self._listen)  # noqa: SLF001
        try:
            self.look()  # for what came before the watch
        except BaseException:
            self.__exit__()
            raise
        return self

    def look(self) -> None:
        """Look into the outbox, too: whoever settled it may have died before telling."""
        self._news.append(self._office._outcome(self._id))  # noqa: SLF001

    def __exit__(self, *_: object) -> None:
        self._office._unwatch(self._id, self._listen)  # noqa: SLF001

    def _listen(self, news: News) -> None:
        self._news.append(news)
        self._wake()

    def result(self) -> str | None:
        """Return the transaction ID, raise what the caller must know, or return None to wait on."""
        check_epoch(self._epoch, self._office._epoch())  # noqa: SLF001
        while self._news:
            news = self._news.popleft()
            if isinstance(news, PerQueueError):
                raise news
            if isinstance(news, Settled):
                return _transaction_id(news)
            error = pause_error(news, self._pauses)
            if error is not None:
                raise error
        return None


class Receipt:
    """Stands for one recorded activity; wait for it, await it, or let it go.

    It is cheap (a number and a weak reference), and dropping it changes nothing. Awaiting it gives the
    transaction ID, or raises as :meth:`wait` does after 30 seconds; cancelling the await cancels only that.
    """

    __slots__ = ("_epoch", "_error", "_office", "id")

    def __init__(
        self,
        activity_id: int,
        office: Callable[[], ReceiptOffice | None],
        error: PerQueueError | None = None,
        epoch: int = 0,
    ) -> None:
        self._epoch = epoch
        self.id = activity_id
        """The activity's number in the outbox; 0 if it could not be stored."""
        self._office = office
        self._error = error

    def __repr__(self) -> str:
        return f"<Receipt {self.id}>"

    def wait(self, timeout: float | None = 30.0) -> str:
        """Block until Per has accepted this activity, and return its transaction ID.

        ``timeout`` is in seconds; None waits without limit. Raises :class:`~perqueue.ActivityRejected`,
        :class:`~perqueue.AuthenticationError`, :class:`~perqueue.FlushTimeout` (it stays pending),
        :class:`~perqueue.QueueClosed`, or :class:`~perqueue.OutboxError` (the outbox cannot be read, or was
        set back: what became of this activity cannot be told). Works also when another process delivers it.
        """
        timeout = checked_timeout("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        office = self._open()
        happened = _threads.new_event()
        pause = _FIRST_LOOK
        with _Hearing(self, office, happened.set) as hearing:
            while (result := hearing.result()) is None:
                left = pause if deadline is None else deadline - time.monotonic()
                if left <= 0:
                    raise self._timed_out(office)
                if not happened.wait(min(left, pause)):
                    hearing.look()
                    pause = min(2 * pause, _LAST_LOOK)
                happened.clear()
            return result

    def __await__(self) -> Generator[object, None, str]:
        return self._wait_async().__await__()

    async def _wait_async(self) -> str:
        import asyncio  # whoever awaits has it loaded

        office = self._open()
        loop = asyncio.get_running_loop()
        happened = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # that loop was closed: nobody waits any more
                loop.call_soon_threadsafe(happened.set)

        with _Hearing(self, office, wake) as hearing:
            try:
                pause = _FIRST_LOOK
                async with asyncio.timeout(_AWAIT_TIMEOUT):
                    while (result := hearing.result()) is None:
                        alarm = loop.call_later(pause, happened.set)
                        await happened.wait()
                        alarm.cancel()
                        if loop.time() >= alarm.when():
                            hearing.look()
                            pause = min(2 * pause, _LAST_LOOK)
                        happened.clear()
                    return result
            except TimeoutError:
                raise self._timed_out(office) from None

    def _open(self) -> ReceiptOffice:
        if self._error is not None:
            raise self._error
        office = self._office()
        if office is None:
            message = "the queue of this receipt is gone; the activity itself is safe in the outbox"
            raise QueueClosed(message)
        return office

    def _timed_out(self, office: ReceiptOffice) -> FlushTimeout:
        why = office._why_pending()  # noqa: SLF001
        check_epoch(self._epoch, office._epoch())  # noqa: SLF001
        return FlushTimeout(f"activity {self.id} is still pending: {why}", pending=1, reason=why)


def check_epoch(then: int, now: int) -> None:
    """Raise :class:`OutboxError` if numbers were taken back since they were given: they tell nothing."""
    if then != now:
        message = (
            "the outbox has gone back to an earlier state since (a backup was restored into it, or rows were"
            " deleted): what was recorded before may have been delivered or not, and is pending only if"
            " `perqueue history` shows it; recording it again changes no bill of this period"
        )
        raise OutboxError(message)


def token_complaint(reason: str) -> str:
    """Say that delivery is paused for want of a token that Per accepts."""
    fault = f"there is no activity token: {reason}"
    if not reason.removeprefix("the ").startswith("activity_token "):  # what a callable did, or did not
        fault = f"Per refused the activity token ({reason})"
    return f"{fault}; everything is kept, delivery is paused"


def pause_error(hold: Hold | None, pauses: int) -> PerQueueError | None:
    """Return what to raise for a pause that a probe after the ``pauses``-th one has confirmed."""
    if hold is None or hold.number <= pauses:
        return None
    if hold.kind == Gate.BAD_TOKEN:
        return AuthenticationError(token_complaint(hold.reason), code=hold.reason)
    if hold.kind == Gate.REFUSED:
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
