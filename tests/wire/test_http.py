"""One connection and its parsers: they read what a server sends as httpx's own transport reads it."""

import asyncio
import socket
import threading

import httpx
import pytest

from perqueue._wire.connections import _SLICE, Connection, Connections, StaleConnection
from perqueue._wire.parser import H11Parser, HttptoolsParser, NotHTTP

PARSERS = [H11Parser, pytest.param(HttptoolsParser, id="HttptoolsParser")]
LARGEST = 1000
HEADERS = [(b"Host", b"per"), (b"Authorization", b"Bearer token"), (b"Accept", b"application/json")]

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "length": OK + b"Content-Length: 5\r\n\r\nhello",
    "no body": OK + b"Content-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
    "chunks": CHUNKED + b"3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n",
    "chunks with extensions": CHUNKED + b"5;a=b\r\nhello\r\n0\r\n\r\n",
    "chunks with a trailer": CHUNKED + b"5\r\nhello\r\n0\r\nA: b\r\n\r\n",
    "until the end": OK + b"Connection: close\r\n\r\nhello",
    "old": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "old until the end": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    "headers twice": b"HTTP/1.1 429 Slow\r\nRetry-After: 1\r\nretry-after: 2\r\nContent-Length: 0\r\n\r\n",
    "odd headers": OK + b"A:\r\nB: \xe9\r\nC:  spaced  \r\nContent-Length: 0\r\n\r\n",
    "error": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 5\r\n\r\noops!",
}
NO_ANSWERS = {
    "nothing": b"",
    "garbage": b"\x16\x03\x01\x02\x00hello\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "half a head": OK + b"Content-Le",
    "half a body": OK + b"Content-Length: 50\r\n\r\nhello",
    "half a chunk": CHUNKED + b"5\r\nhe",
    "no last chunk": CHUNKED + b"5\r\nhello\r\n",
    "a bad chunk": CHUNKED + b"xyz\r\nhello\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "a bad length": OK + b"Content-Length: -5\r\n\r\nhello",
    "a bad header": OK + b"A B: c\r\nContent-Length: 0\r\n\r\n",
    "only a continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "another protocol then": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a long header": OK + b"A: " + b"a" * 200_000 + b"\r\nContent-Length: 0\r\n\r\n",
}


class Server:
    """Answers each connection's first request with given bytes, then closes or waits."""

    def __init__(self, *parts, close=True):
        self.parts = parts
        self.close = close
        self.received = []
        self.connections = 0

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            self.received.append(await reader.readuntil(b"\r\n\r\n"))
            for part in self.parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0)
            if not self.close:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self._server.close()


async def ours(port, parser, largest=LARGEST):
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(parser()), "127.0.0.1", port
    )
    try:
        answer = await connection.get(b"/activities.add?userId=%C3%A9", HEADERS, largest)
        return answer.status, bytes(answer.body), connection.open, answer
    finally:
        connection.abort()
        await asyncio.sleep(0)


async def theirs(port):
    async with httpx.AsyncHTTPTransport() as transport:
        request = httpx.Request("GET", f"http://127.0.0.1:{port}/activities.add", headers=dict(HEADERS))
        response = await transport.handle_async_request(request)
        return response.status_code, await response.aread(), response


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_read_as_httpx_reads_it(parser, name):
    """Status, body and headers are what httpx's own transport makes of the same bytes, however cut."""

    async def main():
        raw = ANSWERS[name]
        for parts in ([raw], [raw[i : i + 1] for i in range(len(raw))]):
            async with Server(*parts) as server:
                status, body, _, answer = await ours(server.port, parser)
                expected, text, response = await theirs(server.port)
                assert (status, body) == (expected, text)
                for header in ("retry-after", "content-length", "a", "b", "c", "nothing"):
                    assert answer.get(header) == response.headers.get(header, "")

    asyncio.run(main())


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_to_httpx_is_none_here(parser, name):
    """What httpx's own transport takes for an error is never read as an answer."""

    async def main():
        async with Server(NO_ANSWERS[name]) as server:
            with pytest.raises((NotHTTP, OSError)):
                await ours(server.port, parser)
            with pytest.raises(httpx.TransportError):
                await theirs(server.port)

    asyncio.run(main())


@pytest.mark.parametrize("parser", PARSERS)
def test_the_request_is_what_was_asked(parser):
    """A GET with its target and headers, as they were given."""

    async def main():
        async with Server(ANSWERS["length"]) as server:
            await ours(server.port, parser)
            return server.received

    [request] = asyncio.run(main())
    assert request.split(b"\r\n") == [
        b"GET /activities.add?userId=%C3%A9 HTTP/1.1",
        b"Host: per",
        b"Authorization: Bearer token",
        b"Accept: application/json",
        b"",
        b"",
    ]


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    ("raw", "kept"),
    [
        (ANSWERS["length"], True),
        (ANSWERS["chunks"], True),
        (ANSWERS["no content"], True),
        (ANSWERS["early hints"], True),
        (ANSWERS["length"] * 2, False),
        (ANSWERS["length"] + b"x", False),
        (ANSWERS["old"], False),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", False),
    ],
)
def test_a_connection_is_kept_only_if_nothing_is_left_on_it(parser, raw, kept):
    """Two answers to one request: the second is never taken for the next request's."""

    async def main():
        async with Server(raw, close=False) as server:
            status, _, is_open, _ = await ours(server.port, parser)
            return status, is_open

    assert asyncio.run(main())[1] is kept


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(("stray", "kept"), [(b"", True), (b"x", False)])
def test_what_follows_an_answer_that_fills_a_slice_is_seen(parser, stray, kept):
    """What a parser is not given any more, because the answer is complete, ends the connection's use, too."""
    head = OK + b"Content-Length: 15000\r\nA: %b\r\n\r\n"
    answer = head % (b"a" * (_SLICE - len(head) + 2 - 15_000)) + b"b" * 15_000
    assert len(answer) == _SLICE
    connection = Connection(parser())
    connection.open = True

    async def main():
        connection._parser.request(b"/", HEADERS, _SLICE)
        waiter = connection._waiter = asyncio.get_running_loop().create_future()
        connection.data_received(answer + stray)
        return len((await waiter).body)

    assert asyncio.run(main()) == 15_000
    assert connection.open is kept


@pytest.mark.parametrize("parser", PARSERS)
def test_a_body_is_read_up_to_a_limit(parser):
    """An endless body ends at the limit: memory stays small."""

    async def main():
        head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
        async with Server(head, *[b"x" * 600] * 100, close=False) as server:
            with pytest.raises(NotHTTP, match="more than 1000 bytes"):
                await ours(server.port, parser)

    asyncio.run(main())


ENDLESS = {
    "informational answers": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000),
    "headers": (OK, b"A: b\r\n" * 5000),
    "trailers": (CHUNKED + b"5\r\nhello\r\n0\r\n", b"A: b\r\n" * 5000),
    "one trailer": (CHUNKED + b"5\r\nhello\r\n0\r\nA: ", b"a" * 30_000),
    "an extension of a chunk": (CHUNKED + b"5;", b"a" * 30_000),
    "zeros before a size": (CHUNKED, b"0" * 30_000),
}


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize("name", ENDLESS)
def test_nothing_of_an_answer_is_endless(parser, name):
    """Whatever a server repeats for ever, it is no answer after some 64 KiB of it."""
    head, more = ENDLESS[name]

    async def main():
        async with Server(head, *[more] * 100, close=False) as server, asyncio.timeout(10):
            with pytest.raises(NotHTTP):
                await ours(server.port, parser)

    asyncio.run(main())


@pytest.mark.parametrize("parser", PARSERS)
@pytest.mark.parametrize(
    "echo", [b"Authorization : Bearer token\r\n", b"GET /activities.add?userId=%C3%A9 HTTP/1.1\r\n"]
)
def test_no_error_quotes_what_a_server_repeats(parser, echo):
    """A server that sends the request back, malformed, gets neither token nor ID into an error's text."""

    async def main():
        async with Server(OK + echo + b"\r\n") as one, Server(echo + b"\r\n") as other:
            for port in (one.port, other.port):
                with pytest.raises(NotHTTP) as caught:
                    await ours(port, parser)
                assert "token" not in str(caught.value)
                assert "userId" not in str(caught.value)

    asyncio.run(main())


def test_a_loop_of_uvloops_will_do():
    """Whoever awaits may run uvloop, as uvicorn does."""
    uvloop = pytest.importorskip("uvloop")

    async def main():
        async with Keeping() as server:
            connections = Connections("localhost", server.port, None)
            for _ in range(3):
                assert (await connections.get(b"/", HEADERS, LARGEST)).status == 200
            await connections.aclose()
            return server.connections

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == 1


def test_a_connection_is_used_again():
    """One connection serves one request after the other."""

    async def main():
        async with Keeping() as server:
            connections = Connections("127.0.0.1", server.port, None)
            for _ in range(5):
                answer = await connections.get(b"/", HEADERS, LARGEST)
                assert bytes(answer.body) == b"hello"
            await asyncio.gather(*(connections.get(b"/", HEADERS, LARGEST) for _ in range(4)))
            opened = server.connections
            await connections.aclose()
            return opened

    assert asyncio.run(main()) == 4


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch):
    """A proxy may have forgotten it, without a word: the next request goes over a new one."""
    monkeypatch.setattr("perqueue._wire.connections.KEEP_ALIVE", -1.0)

    async def main():
        async with Keeping() as server:
            connections = Connections("127.0.0.1", server.port, None)
            for _ in range(2):
                await connections.get(b"/", HEADERS, LARGEST)
            await connections.aclose()
            return server.connections

    assert asyncio.run(main()) == 2


class Keeping(Server):
    """Answers so many requests of a connection, and ends it then, or with the next request."""

    def __init__(self, answers=1_000_000, hangs_up_on_next=None):
        super().__init__()
        self.answers = answers
        self.hangs_up_on_next = hangs_up_on_next

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            for _ in range(self.answers):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(ANSWERS["length"])
            if self.hangs_up_on_next is not None:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(self.hangs_up_on_next)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


async def noticed(connection):
    for _ in range(1000):
        if not connection.open:
            return
        await asyncio.sleep(0.005)
    pytest.fail("the end of an idle connection was not noticed")


def test_a_connection_that_the_server_has_ended_is_not_used_again():
    """The end of an idle connection is noticed at once: its descriptor is given back, the next one is new."""

    async def main():
        async with Keeping(answers=1) as server:
            connections = Connections("127.0.0.1", server.port, None)
            for _ in range(3):
                await connections.get(b"/", HEADERS, LARGEST)
                await noticed(connections._idle[0])
            await connections.aclose()
            return server.connections

    assert asyncio.run(main()) == 3


def test_an_end_without_an_answer_on_a_used_connection_is_told_apart():
    """The server may end a connection in the moment in which it is used again: that is no outage."""

    async def main():
        async with Keeping(answers=1, hangs_up_on_next=b"") as server:
            connections = Connections("127.0.0.1", server.port, None)
            await connections.get(b"/", HEADERS, LARGEST)
            with pytest.raises(StaleConnection):
                await connections.get(b"/", HEADERS, LARGEST)
            await connections.aclose()

    asyncio.run(main())


def test_half_an_answer_on_a_used_connection_is_not_told_apart():
    """Once anything has come, the server has seen the request: it is not asked again at once."""

    async def main():
        half = b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello"
        async with Keeping(answers=1, hangs_up_on_next=half) as server:
            connections = Connections("127.0.0.1", server.port, None)
            await connections.get(b"/", HEADERS, LARGEST)
            with pytest.raises(NotHTTP):
                await connections.get(b"/", HEADERS, LARGEST)
            await connections.aclose()

    asyncio.run(main())


def test_what_has_come_to_the_kernel_is_seen_before_a_connection_is_used_again():
    """Bytes that nobody asked for end a connection's use, also before the event loop has read them."""

    async def main():
        stray = ANSWERS["length"].replace(b"hello", b"stray")
        with socket.create_server(("127.0.0.1", 0)) as server:
            connections = Connections(*server.getsockname(), None)
            first = asyncio.create_task(connections.get(b"/", HEADERS, LARGEST))
            served, _ = await asyncio.to_thread(server.accept)
            with served:
                await asyncio.to_thread(served.recv, 1000)
                served.sendall(ANSWERS["length"])
                await first
                served.sendall(stray)  # the loop has no chance to read it before the next request
                second = asyncio.create_task(connections.get(b"/", HEADERS, LARGEST))
                other, _ = await asyncio.to_thread(server.accept)
                with other:
                    other.sendall(ANSWERS["length"])
                    assert bytes((await second).body) == b"hello"
            await connections.aclose()

    asyncio.run(main())


def test_a_client_may_be_used_in_one_loop_after_the_other():
    """What an ended event loop had open is not used in the next one."""
    received = []

    def answer(server):
        for _ in range(2):
            served, _ = server.accept()
            received.append(served.recv(1000))
            served.sendall(ANSWERS["length"])
            keep.append(served)

    keep = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        connections = Connections(*server.getsockname(), None)

        async def ask(*, last):
            async with asyncio.timeout(10):
                assert (await connections.get(b"/", HEADERS, LARGEST)).status == 200
            if last:
                await connections.aclose()

        asyncio.run(ask(last=False))
        asyncio.run(ask(last=True))
        thread.join(10)
    for served in keep:
        served.close()
    assert len(received) == 2


def test_whoever_gives_up_leaves_no_half_used_connection():
    """A cancelled request's connection is closed: a late answer reaches nobody."""

    async def main():
        async with Server(close=False) as server:
            connections = Connections("127.0.0.1", server.port, None)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await connections.get(b"/", HEADERS, LARGEST)
            assert not connections._idle
            await connections.aclose()

    asyncio.run(main())
