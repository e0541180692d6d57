"""Connections to one server: asyncio carries the bytes, a parser makes sense of them.

Each serves one request at a time and is kept alive between them. httpx's own connections cost many times
the CPU of the parser under them, in locks, tracing and a pool that one request at a time has no use for;
`make bench` measures it.
"""

from __future__ import annotations

import asyncio
import select
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from perqueue import _threads
from perqueue._wire.parser import new_parser

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from perqueue._wire.parser import Answer, Parser, RawHeaders

KEEP_ALIVE = 30.0
"""Seconds after which an idle connection is not used again: a proxy may have forgotten it."""
_HAPPY_EYEBALLS = 0.25
"""Seconds after which the next address of a host is tried, too (RFC 8305)."""
_SLICE = 16 * 1024
_abandoned: list[object] = []


class ConnectError(OSError):
    """No connection came about."""


class StaleConnection(Exception):
    """A connection that was kept alive ended before anything of an answer came."""


class Connection(asyncio.Protocol):
    """One connection, as asyncio drives it."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Answer] | None = None
        self._arrivals = _threads.original("select", "poll")()
        self._silent = True
        self.reused = False
        self.used_at = 0.0
        self.open = False
        """Whether another request may be sent."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport = cast("asyncio.Transport", transport)
        self.open = True
        self._arrivals.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def is_quiet(self) -> bool:
        """Tell whether it is open, and nothing has come since the latest answer, not even to the kernel."""
        return self.open and not self._arrivals.poll(0)

    def data_received(self, data: bytes) -> None:
        """Take a part of the answer."""
        self._silent = False
        self._feed(data)

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whichever side."""
        self.open = False
        if self._waiter is None:
            return
        if self._silent and self.reused:
            self._fail(StaleConnection(str(error or "closed")))
        elif error is not None:
            self._fail(error)
        else:
            self._feed(b"")

    def _feed(self, data: bytes) -> None:
        if self._waiter is None:
            self.abort()  # nothing was asked: whatever this is, it must not be taken for the next answer
            return
        try:
            rest = self._until_complete(data)
        except Exception as error:  # noqa: BLE001 - whatever a parser raises: nobody else would tell
            self._fail(error)
            return
        if rest is None:
            return
        waiter, self._waiter = self._waiter, None
        if rest or not self._parser.keeps_alive():
            self.abort()
        if not waiter.done():
            waiter.set_result(cast("Answer", self._parser.answer))

    def _until_complete(self, data: bytes) -> int | None:
        """Feed the parser until the answer is complete; return how many bytes were left then."""
        # In slices: a parser looks at its limits after each, and a server may send what is all overhead.
        for end in range(_SLICE, len(data) + _SLICE, _SLICE) if data else (_SLICE,):
            if self._parser.feed(data[end - _SLICE : end]):
                return max(0, len(data) - end)
        return None

    def _fail(self, error: Exception) -> None:
        waiter, self._waiter = self._waiter, None
        self.abort()
        if waiter is not None and not waiter.done():
            waiter.set_exception(error)

    def abort(self) -> None:
        """Close it at once."""
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    async def get(self, target: bytes, headers: RawHeaders, largest: int) -> Answer:
        """Send a GET and return its answer. Raises :class:`OSError`, ``NotHTTP`` and ``StaleConnection``."""
        assert self._transport is not None  # noqa: S101 - for the type checker
        self._silent = True
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(self._parser.request(target, headers, largest))
        try:
            answer: Answer = await waiter
        except BaseException:
            self._waiter = None
            self.abort()
            raise
        return answer


class Connections:
    """The connections to one server."""

    def __init__(
        self,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext] | None,
        *,
        is_name: bool = True,
    ) -> None:
        self._host = host
        self._is_name = is_name
        self._port = port
        self._context = context
        self._idle: deque[Connection] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def forget(self) -> None:
        """Abandon every connection without touching it, in a forked child for instance."""
        _abandoned.append(self._idle)  # kept alive for good: collecting them would close them
        self._idle = deque()

    async def get(self, target: bytes, headers: RawHeaders, largest: int, *, new: bool = False) -> Answer:
        """Send a GET over an idle connection, if there is one and ``new`` is not asked for, or a new one.

        See :meth:`Connection.get`.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # another asyncio.run(): what the loop before had is dead
            self.forget()
            self._loop = loop
        connection = None if new else self._take(loop.time())
        connection = connection or await self._connect(loop)
        answer = await connection.get(target, headers, largest)
        if connection.open:
            connection.reused = True
            connection.used_at = loop.time()
            self._idle.append(connection)
        return answer

    def _take(self, now: float) -> Connection | None:
        # Last in, first out: those that are not needed age, and are closed.
        while self._idle and (not self._idle[0].open or self._idle[0].used_at < now - KEEP_ALIVE):
            self._idle.popleft().abort()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.abort()
        return None

    async def _connect(self, loop: asyncio.AbstractEventLoop) -> Connection:
        context = self._context() if self._context is not None else None
        more: dict[str, Any] = {}
        # uvloop's loop tries one address after the other. Nor does a single one need a race, in which
        # asyncio loses the socket if it is cancelled in the moment of its success.
        if self._is_name and isinstance(loop, asyncio.BaseEventLoop):
            more["happy_eyeballs_delay"] = _HAPPY_EYEBALLS
        try:
            _, connection = await loop.create_connection(
                lambda: Connection(new_parser()), self._host, self._port, ssl=context, **more
            )
        except OSError as error:
            raise ConnectError(str(error)) from error
        return connection

    async def aclose(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # the loop closes a socket in its next round
