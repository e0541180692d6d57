"""httpx transports that are kept alive, each lent to one request at a time: for proxies, and as given.

One httpx transport stands for one connection: httpx's shared pool costs a time that grows with the square
of the requests in flight (encode/httpx#3215), and lends a connection on which something lies that nobody
asked for, which would then be taken for the next request's answer.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import asynccontextmanager, suppress
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    import httpx

_SWEEP = 1.0
"""Seconds after which a connection that the server has ended is closed here, too."""


@dataclass(frozen=True, slots=True)
class Loan:
    """A transport, for one request."""

    transport: httpx.AsyncBaseTransport
    reused: bool
    """Whether an earlier request went over its connection, so that the server may be about to end it."""


class Transports:
    """The connections that are open and idle, for use within one event loop."""

    def __init__(self, make: Callable[[], httpx.AsyncBaseTransport]) -> None:
        self._make = make
        self.forget()

    def forget(self) -> None:
        """Abandon every connection without touching it, in a forked child for instance."""
        # Last in, first out: those that are not needed age, and are closed.
        self._idle: list[httpx.AsyncBaseTransport] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def lend(self, *, new: bool = False) -> AsyncIterator[Loan]:
        """Lend a transport with one connection of its own; it is kept only if nothing is wrong with it."""
        transport = None if new else await self._take()
        reused = transport is not None
        transport = transport or self._make()
        kept = False
        try:
            yield Loan(transport, reused)
            kept = is_quiet(transport)
        finally:
            if not kept:
                await _close([transport])
        if kept:
            self._idle.append(transport)
            self._sweep_later()

    async def _take(self) -> httpx.AsyncBaseTransport | None:
        while self._idle:
            transport = self._idle.pop()
            if is_quiet(transport):
                return transport
            await _close([transport])
        return None

    def _sweep_later(self) -> None:
        if self._timer is None and self._idle:
            self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        """Close what the server has ended or nobody has needed for long."""
        self._timer = None
        ended = [transport for transport in self._idle if not is_quiet(transport)]
        if ended:
            self._idle = [transport for transport in self._idle if transport not in ended]
            closing = asyncio.get_running_loop().create_task(_close(ended))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._sweep_later()

    async def aclose(self) -> None:
        """Close those that are idle."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        idle, self._idle = self._idle, []
        await _close(idle)
        await asyncio.gather(*self._closing)


def replica(given: httpx.AsyncHTTPTransport) -> httpx.AsyncHTTPTransport:
    """Return a transport with the given one's settings and no connection.

    The given one serves several event loops (the drain's, the reports', those of a restart), and a
    connection only the one that it was made in.
    """
    pool: Any = copy(given._pool)  # noqa: SLF001 - httpx has no public way to make another like it
    pool._connections, pool._requests = [], []  # noqa: SLF001
    made = copy(given)
    made._pool = pool  # noqa: SLF001
    return made


async def _close(transports: Iterable[httpx.AsyncBaseTransport]) -> None:
    for transport in transports:
        with suppress(Exception):
            await transport.aclose()


def is_quiet(transport: Any) -> bool:
    """Tell whether its connection is open and idle, and nothing came over it beyond the last answer.

    Three places may hold such bytes, and httpx looks into none but the socket: the socket, TLS, and the
    parser, which has read two answers at once when they came in one segment.
    """
    try:
        (outer,) = transport._pool.connections  # noqa: SLF001 - httpx has no public way to them
        inner = outer
        while not hasattr(inner, "_h11_state"):
            inner = inner._connection  # noqa: SLF001 - it is inside of a proxy's
        parsed, _ = inner._h11_state.trailing_data  # noqa: SLF001
        tls = inner._network_stream.get_extra_info("ssl_object")  # noqa: SLF001
    except (AttributeError, ValueError):
        return False  # it was closed; or httpx is built otherwise: a new connection is always right
    return bool(outer.is_available() and not outer.has_expired() and not parsed and _is_drained(tls))


def _is_drained(tls: ssl.SSLObject | None) -> bool:
    if tls is None:
        return True
    try:
        tls.read(1)
    except ssl.SSLWantReadError:
        return True
    except (ssl.SSLError, OSError, ValueError):
        return False
    return False
