"""The thread, the event loop and the sockets below a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Any

from perqueue.sandbox import _fork
from perqueue.sandbox._aiohttp import web
from perqueue.sandbox._sockets import bind

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable, Coroutine, Iterator

    from perqueue.sandbox._app import App

_abandoned: list[Any] = []  # of a forked child: closing a loop there would unsettle the parent's


class Engine:
    """Starts, listens, goes down, comes back and stops; from any thread, in any order, repeatedly."""

    def __init__(
        self,
        app: App,
        *,
        host: str,
        port: int,
        ssl_context: ssl.SSLContext | None,
        on_fork: Callable[[], None],
    ) -> None:
        """Serve `app`; `port` 0 becomes a free one at the first start, and stays.

        `on_fork` is called in every forked child.
        """
        self._app = app
        self._ssl = ssl_context
        self._on_fork = on_fork
        self.host = host
        self.port = port
        self._forget()
        _fork.watch(self)

    def _forget(self) -> None:
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reserved: socket.socket | None = None
        self._listening: tuple[asyncio.Server, socket.socket] | None = None
        self._http: web.Server | None = None
        self._stopping = asyncio.Event()

    @property
    def state(self) -> str:
        """One of `stopped`, `down` and `listening`."""
        if self._thread is None:
            return "stopped"
        return "down" if self._listening is None else "listening"

    def start(self) -> None:
        """Return once it listens."""
        self._not_from_within()
        with self._lock:
            if self._thread is None:
                # Bound but never listening: while the sandbox is down, connections are refused and no
                # outgoing connection of anybody is given this port as its own.
                self._reserved = bind(self.host, self.port)
                self.port = self._reserved.getsockname()[1]
                ready = threading.Event()
                self._thread = threading.Thread(
                    target=self._live, args=(ready,), name="per-sandbox", daemon=True
                )
                self._thread.start()
                ready.wait()
            try:
                self.come_back()
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Close everything, at once; requests under way get no answer."""
        self._not_from_within()
        with self._lock:
            if self._thread is None:
                return
            self.soon(self._stopping.set)
            self._thread.join()
            self._thread = self._loop = None
            if self._reserved is not None:
                self._reserved.close()
                self._reserved = None

    def come_back(self) -> None:
        """Listen, unless it does."""
        self._run(self._listen)

    def go_down(self) -> None:
        """Refuse connections and drop those that are open."""
        self._run(self._drop)

    def soon(self, action: Callable[[], None]) -> None:
        """Run something on the loop, if there is one."""
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # closed since
                loop.call_soon_threadsafe(action)

    def descriptors(self) -> Iterator[int]:
        """Return the file descriptors of all sockets."""
        if self._reserved is not None:
            yield self._reserved.fileno()
        if self._listening is not None:
            yield self._listening[1].fileno()
        for connection in self._connections():
            if connection.transport is not None:
                yield connection.transport.get_extra_info("socket").fileno()

    def abandon(self) -> None:
        """Become a stopped one, in a forked child."""
        _abandoned.append((self._thread, self._loop, self._reserved, self._listening, self._http))
        self._forget()
        self._on_fork()

    def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._not_from_within()
        with self._lock:
            if self._loop is None:
                raise RuntimeError("the sandbox is not started")
            asyncio.run_coroutine_threadsafe(work(), self._loop).result()

    def _not_from_within(self) -> None:
        if threading.current_thread() is self._thread:
            raise RuntimeError("a callback of the sandbox cannot start or stop it: use another thread")

    def _connections(self) -> list[web.RequestHandler]:
        return [] if self._http is None else self._http.connections

    def _live(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._main(ready))
        finally:
            ready.set()

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._app.release()  # what hanging requests wait for belongs to one loop
        self._http = web.Server(self._handle, handler_cancellation=True, access_log=None)
        ready.set()
        await self._stopping.wait()
        await self._drop()
        self._http = None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._listening is None and request.transport is not None:
            request.transport.abort()  # a TLS handshake may end after the sandbox went down
            await asyncio.Event().wait()
        return await self._app.handle(request)

    async def _listen(self) -> None:
        if self._listening is not None or self._http is None:
            return
        bound = bind(self.host, self.port)
        try:
            server = await asyncio.get_running_loop().create_server(
                self._http, sock=bound, ssl=self._ssl, backlog=1024
            )
        except BaseException:
            bound.close()
            raise
        self._listening = server, bound

    async def _drop(self) -> None:
        if self._listening is not None:
            server, bound = self._listening
            self._listening = None
            # First no more connections are taken, then those just taken get the few turns of the loop that
            # they need to register: a server closed in between would leave them open, with nobody to answer.
            asyncio.get_running_loop().remove_reader(bound)
            await self._abort()
            server.close()
        await self._abort()

    async def _abort(self) -> None:
        for _ in range(5):
            for connection in self._connections():
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)
