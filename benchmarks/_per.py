"""A Per as fast as asyncio can be, in a process of its own: answers alike, after a latency.

It prints its port, serves until its standard input ends, and then prints how many requests it has answered
and refused in each second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import ssl
import sys
import time
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2.connection import H2Connection


def _answer(status: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


BODY = b'{"ok":true,"result":{"transactionId":"35434hjgghf46h34jh"}}'
TAKEN = _answer("200 OK", BODY)
REFUSED = _answer("429 Too Many Requests", b'{"ok":false,"message":"rate_limited"}')


class Limiter:
    """A bucket of one second's requests, refilled evenly; and a count of each second."""

    def __init__(self, per_second: float) -> None:
        self._rate = per_second
        self._burst = self._tokens = math.ceil(per_second) if per_second else 0.0
        self._began = self._at = time.monotonic()
        self.seconds: list[list[int]] = []

    def takes(self) -> bool:
        """Tell whether one more request may pass."""
        if not self._rate:
            return True
        now = time.monotonic()
        if not self.seconds:
            self._began = now
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        taken = self._tokens >= 1
        self._tokens -= taken
        while len(self.seconds) <= now - self._began:
            self.seconds.append([0, 0])
        self.seconds[-1][0 if taken else 1] += 1
        return taken


class Connection(asyncio.Protocol):
    """Answers one request after the other, however they are cut into segments."""

    def __init__(self, latency: float, limiter: Limiter) -> None:
        self._latency = latency
        self._limiter = limiter
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            _, self._received = self._received.split(b"\r\n\r\n", 1)
            answer = TAKEN if self._limiter.takes() else REFUSED
            if self._latency:
                asyncio.get_running_loop().call_later(self._latency, self._write, answer)
            else:
                self._write(answer)

    def _write(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


class Http2Connection(asyncio.Protocol):
    """The same in HTTP/2, without TLS and without asking first (prior knowledge)."""

    def __init__(self, latency: float) -> None:
        from h2.config import H2Configuration
        from h2.connection import H2Connection
        from h2.settings import SettingCodes

        self._latency = latency
        self._http: H2Connection = H2Connection(H2Configuration(client_side=False))
        self._http.local_settings.update({SettingCodes.MAX_CONCURRENT_STREAMS: 1000})

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the settings."""
        self._transport = cast("asyncio.Transport", transport)
        self._http.initiate_connection()
        self._transport.write(self._http.data_to_send())

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        for event in self._http.receive_data(data):
            if type(event).__name__ == "StreamEnded":
                stream: int = event.stream_id
                asyncio.get_running_loop().call_later(self._latency, self._answer, stream)
        self._transport.write(self._http.data_to_send())

    def _answer(self, stream: int) -> None:
        if not self._transport.is_closing():
            head = [(":status", "200"), ("content-type", "application/json")]
            self._http.send_headers(stream, [*head, ("content-length", str(len(BODY)))])
            self._http.send_data(stream, BODY, end_stream=True)
            self._transport.write(self._http.data_to_send())


async def serve(options: argparse.Namespace) -> None:
    """Serve on a free port until standard input ends."""
    limiter = Limiter(options.limit)
    protocol: Callable[[], asyncio.Protocol]
    if options.http2:
        protocol = lambda: Http2Connection(options.latency)  # noqa: E731
    else:
        protocol = lambda: Connection(options.latency, limiter)  # noqa: E731
    context = None
    if options.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(options.certificate)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=1024, ssl=context)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(limiter.seconds))


def _run(main: Any) -> None:
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)  # the server's CPU is nobody's subject: as little as possible


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before an answer")
    parser.add_argument("--limit", type=float, default=0.0, help="requests a second; 429 beyond")
    parser.add_argument("--certificate", help="PEM file: serve over TLS")
    parser.add_argument("--http2", action="store_true")
    _run(serve(parser.parse_args()))
