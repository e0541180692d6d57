"""A wire to a server that can be cut: it then carries nothing, and tells nobody."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class Wire:
    """Forwards connections from a port of its own, or from a listener's, to another one, until it is cut."""

    def __init__(self, port: int, listener: socket.socket | None = None) -> None:
        self._target = port
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._whole = threading.Event()
        self._whole.set()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._over = False
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Carry nothing any more: what is sent is neither answered nor refused."""
        self._whole.clear()

    def mend(self) -> None:
        """Carry everything again, also what was sent meanwhile."""
        self._whole.set()

    def close(self) -> None:
        """Carry nothing any more, and tell both ends."""
        self._over = True
        self._whole.set()
        self._thread.join(5)

    def _run(self) -> None:
        while self._whole.wait() and not self._over:
            ready, _, _ = select.select([self._listener, *self._pairs], [], [], 0.01)
            if not self._whole.is_set():
                continue
            for end in ready:
                if end is self._listener:
                    self._open(end.accept()[0])
                elif end in self._pairs:
                    self._carry(end)
        for end in (self._listener, *self._pairs):
            end.close()

    def _open(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:  # nobody is there: so it looks from here, too
            near.close()
        else:
            self._pairs |= {near: far, far: near}

    def _carry(self, end: socket.socket) -> None:
        data = b""
        with suppress(OSError):
            data = end.recv(1 << 16)
            if data:
                self._pairs[end].sendall(data)
        if not data:
            other = self._pairs.pop(end)
            self._pairs.pop(other, None)
            end.close()
            other.close()
