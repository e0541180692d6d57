"""An event loop whose host name look-ups survive the end of the interpreter, and never delay it."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from contextlib import suppress
from typing import Any


class DaemonResolver:
    """Resolves host names on one daemon thread.

    asyncio's own look-ups run in an executor, which takes no more work once the interpreter is
    shutting down, and whose threads are joined at exit: an exit handler could not deliver to a host
    name, and a slow name server could hold up the end of the program.
    """

    def __init__(self) -> None:
        self._questions: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="perqueue-resolve", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (question := self._questions.get()) is not None:
            loop, answer, args = question
            try:
                result: object = socket.getaddrinfo(*args)
            except Exception as error:  # noqa: BLE001 - carried to whoever asked
                result = error
            with suppress(RuntimeError):  # that loop is closed: nobody waits for this answer any more
                loop.call_soon_threadsafe(_resolve, answer, result)
            del question, loop, answer, result  # or the last loop would live as long as this thread

    def ask(self, loop: asyncio.AbstractEventLoop, *args: object) -> asyncio.Future[Any]:
        """Look up with the arguments of :func:`socket.getaddrinfo`; await the future for the answer."""
        answer = loop.create_future()
        self._questions.put((loop, answer, args))
        return answer

    def close(self) -> None:
        """Let the thread end after the look-up it is in."""
        self._questions.put(None)


def _resolve(answer: asyncio.Future[Any], result: object) -> None:
    if answer.done():
        return
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)


class DeliveryLoop(asyncio.SelectorEventLoop):
    """The event loop that perqueue's own threads run."""

    def __init__(self, resolver: DaemonResolver | None = None) -> None:
        super().__init__()
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
