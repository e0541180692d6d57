"""A server that says exactly what a test tells it to, byte for byte, over TCP or TLS."""

import socket
import threading
from collections import Counter
from contextlib import suppress
from urllib.parse import parse_qs, urlsplit


def answer_to(request, body=None, *, extra=b""):
    """Return a complete answer; by default a yes to the activity, with an ID that names its user."""
    if body is None:
        body = b'{"ok": true, "result": {"transactionId": "T-%s"}}' % user_of(request).encode()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    return head + extra + b"\r\n" + body


def user_of(request):
    """Return the user ID that a request names."""
    target = request.split(b" ", 2)[1].decode()
    return parse_qs(urlsplit(target).query).get("userId", [""])[0]


class Wire:
    """One connection of a client's."""

    def __init__(self, server, connection, number):
        self.server = server
        self.connection = connection
        self.number = number
        self._rest = b""

    def request(self):
        """Return the next request's head; None once the client has closed the connection."""
        while b"\r\n\r\n" not in self._rest:
            chunk = self.connection.recv(65536)
            if not chunk:
                return None
            self._rest += chunk
        request, _, self._rest = self._rest.partition(b"\r\n\r\n")
        return request

    def send(self, data):
        """Send bytes."""
        self.connection.sendall(data)

    def accept(self, request):
        """Count the request's activity, and say so."""
        self.server.accepted[user_of(request)] += 1
        self.send(answer_to(request))

    def reset(self):
        """End the connection with a reset."""
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()


def healthy(wire, request):
    """Accept everything."""
    wire.accept(request)


class RawServer:
    """Answers each request by calling ``behave(wire, request)``, which may be exchanged at any time.

    A true return value ends the connection. ``accepted`` counts the activities that it said yes to, by
    user ID; ``requests`` has (number of the connection, user ID) of each request; ``connections`` counts.
    """

    def __init__(self, behave=healthy, tls=None):
        self.behave = behave
        self.accepted = Counter()
        self.requests = []
        self.connections = 0
        self.stopped = threading.Event()
        self._tls = tls
        self._connections = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        self.url = f"https://localhost:{self.port}" if tls else f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with suppress(OSError):  # closed: the test is over
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections.append(connection)
                self.connections = number = len(self._connections)
                threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection, number):
        with suppress(OSError), connection:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            wire = Wire(self, connection, number)
            with connection:
                while (request := wire.request()) is not None:
                    self.requests.append((number, user_of(request)))
                    if self.behave(wire, request):
                        return
