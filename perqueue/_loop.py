"""An event loop whose host name look-ups survive the end of the interpreter, and never delay it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from perqueue import _threads

if TYPE_CHECKING:
    from collections.abc import Callable


class DaemonThread:
    """Runs functions that may block, one after the other, on one daemon thread.

    asyncio's own executor takes no more work once the interpreter is shutting down, and its threads are
    joined at exit: an exit handler could not deliver, and a slow function could hold up the end of the
    program. Raises :class:`RuntimeError` if the thread cannot be started, which Python 3.12 and later
    refuse while the interpreter is shutting down.
    """

    def __init__(self, name: str) -> None:
        self._questions: _threads.SimpleQueue[tuple[Any, ...] | None] = _threads.SimpleQueue()
        # Not a method: a thread that holds its owner would never see it collected.
        _threads.new_thread(_answer, (self._questions,), name=name).start()

    def run(
        self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: object
    ) -> asyncio.Future[Any]:
        """Call a function; await the future for what it returns or raises (an :class:`Exception` only)."""
        answer = loop.create_future()
        self._questions.put((loop, answer, function, args))
        return answer

    def close(self) -> None:
        """Let the thread end after what it is doing."""
        self._questions.put(None)


def _answer(questions: _threads.SimpleQueue[tuple[Any, ...] | None]) -> None:
    while (question := questions.get()) is not None:
        loop, answer, function, args = question
        if not answer.done():  # else whoever asked has given up meanwhile
            try:
                result, failed = function(*args), False
            except Exception as error:  # noqa: BLE001 - carried to whoever asked
                result, failed = error, True
            with suppress(RuntimeError):  # that loop is closed: nobody waits for this answer any more
                loop.call_soon_threadsafe(_resolve, answer, result, failed)
            del result
        del question, loop, answer, function, args  # or the last loop would live as long as this thread


def _resolve(answer: asyncio.Future[Any], result: Any, failed: bool) -> None:  # noqa: FBT001 - a callback
    if answer.done():
        return
    if failed:
        answer.set_exception(result)
    else:
        answer.set_result(result)


class DaemonResolver(DaemonThread):
    """Resolves host names on a daemon thread."""

    def __init__(self) -> None:
        super().__init__("perqueue-resolve")

    def ask(self, loop: asyncio.AbstractEventLoop, *args: Any) -> asyncio.Future[Any]:
        """Look up with the arguments of :func:`socket.getaddrinfo`; await the future for the answer."""
        return self.run(loop, _threads.original("socket", "getaddrinfo"), *args)


class DeliveryLoop(asyncio.SelectorEventLoop):
    """The event loop that perqueue's own threads run."""

    def __init__(self, resolver: DaemonResolver | None = None) -> None:
        super().__init__(_threads.original("selectors", "DefaultSelector")())
        self._resolver = resolver

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's name
        proto: int = 0,
        flags: int = 0,
    ) -> Any:
        """Look up a host name on the daemon thread."""
        if self._resolver is None:
            try:
                self._resolver = DaemonResolver()
            except RuntimeError:
                message = "no host name can be looked up while the interpreter is shutting down"
                raise OSError(message) from None
        return await self._resolver.ask(self, host, port, family, type, proto, flags)

    def close(self) -> None:
        """Close the loop and let the look-up thread end."""
        if self._resolver is not None:
            self._resolver.close()
            self._resolver = None
        super().close()
