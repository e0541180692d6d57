"""Connections that are kept alive: what lies on them, and how they end."""

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import threading
from pathlib import Path

import httpx
import pytest
import trustme

from perqueue import PerClient, RetryPolicy
from perqueue._activity import Activity, Verdict
from perqueue._settings import resolve_client_settings
from perqueue._wire.exchange import Wire
from perqueue._wire.transports import Transports
from tests.faults._raw_server import RawServer, answer_to

PATIENT = RetryPolicy(base=600, cap=600)
"""Whoever takes the end of a connection for an outage waits for minutes: no test passes by that."""


ENDED = re.compile("RemoteProtocolError|ended before the answer|closed")


@pytest.fixture(scope="module")
def authority():
    """A certificate authority of the test's own."""
    return trustme.CA()


@pytest.fixture(params=["tcp", "tls"])
def kind(request, authority):
    """What a server and a queue need to speak plain HTTP, or HTTPS."""
    if request.param == "tcp":
        return None, True
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@pytest.fixture(params=["direct", "httpx"])
def queue_for(request, make_queue):
    """Make a queue that delivers to a raw server, one request at a time: straight, or through httpx."""

    def make(server, verify=True):
        options = {"base_url": server.url, "max_in_flight": 1, "retry": PATIENT, "activity_token": "token-1"}
        if request.param == "direct":
            return make_queue(**options, verify=verify)
        return make_queue(**options, transport=httpx.AsyncHTTPTransport(verify=verify, trust_env=False))

    return make


def in_one_segment(wire, *parts):
    """Send several writes (several records, over TLS) as one TCP segment."""
    wire.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    wire.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for part in parts:
        wire.send(part)
    wire.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


STRAY = answer_to(b"", b'{"ok": true, "result": {"transactionId": "STRAY"}}')


def test_an_answer_that_nobody_asked_for_is_nobodys_answer(kind, queue_for):
    """Two answers in one segment are one answer: the next request goes over another connection."""

    def twice(wire, request):
        wire.server.accepted[wire.number] += 1
        in_one_segment(wire, answer_to(request), STRAY)

    with RawServer(twice, kind[0]) as server:
        queue = queue_for(server, verify=kind[1])
        for number in range(5):
            assert queue.record("G", f"USER_{number}").wait(10) == f"T-USER_{number}"
        assert [user for _, user in server.requests] == [f"USER_{number}" for number in range(5)]


def test_an_answer_that_comes_later_unasked_is_nobodys_answer(kind, queue_for):
    """What arrives on an idle connection ends its use."""
    sent = threading.Event()

    def and_later(wire, request):
        wire.accept(request)
        if wire.number == 1:
            wire.send(STRAY)
        sent.set()

    with RawServer(and_later, kind[0]) as server:
        queue = queue_for(server, verify=kind[1])
        assert queue.record("G", "USER_1").wait(10) == "T-USER_1"
        assert sent.wait(10)
        assert queue.record("G", "USER_2").wait(10) == "T-USER_2"


def test_connections_are_kept_alive(kind, queue_for):
    """A server that says what it was asked, and no more, sees one connection for many requests."""
    with RawServer(tls=kind[0]) as server:
        queue = queue_for(server, verify=kind[1])
        for number in range(20):
            queue.record("G", f"USER_{number}").wait(10)
        assert {number for number, _ in server.requests} == {1}


def connections_to(port):
    """Count this process's sockets that are connected, or half closed, towards a port of its own."""
    lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    towards = {line[9] for line in lines if line[2].endswith(f":{port:04X}") and line[3] in ("01", "08")}
    return sum(1 for inode in towards if f"socket:[{inode}]" in open_files())


def open_files():
    """Return what this process's descriptors stand for."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(descriptor.readlink()))
    return found


def test_a_connection_that_the_server_has_ended_is_closed_soon(queue_for, until):
    """An idle process keeps no half-closed connection (CLOSE_WAIT) until its next request."""
    tired = threading.Event()

    def once(wire, request):
        wire.accept(request)
        tired.wait(10)
        return True

    with RawServer(once) as server:
        queue = queue_for(server)
        queue.record("G", "USER_1").wait(10)
        assert connections_to(server.port) == 1
        tired.set()
        until(lambda: connections_to(server.port) == 0, timeout=10)


def test_nobody_keeps_a_connection_for_long_without_a_request():
    """A connection that is not needed is closed here, without the server's doing."""

    def make():
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=0.3)
        return httpx.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def main():
        with RawServer() as server:
            connections = Transports(make)
            async with connections.lend() as loan:
                response = await loan.transport.handle_async_request(httpx.Request("GET", server.url))
                await response.aread()
            assert connections_to(server.port) == 1
            async with asyncio.timeout(10):
                while connections_to(server.port):  # noqa: ASYNC110 - what ends it is in the kernel
                    await asyncio.sleep(0.01)
            await connections.aclose()

    asyncio.run(main())


ACTIVITY = Activity(id=1, billing_id="G", user_id="USER_1", activity_type_id="TYPE", recorded_at=0)


def wire_to(server, **given):
    """Return what sends single requests to a server."""
    options = {
        "activity_token": "token-1",
        "reporting_token": None,
        "activity_type_id": None,
        "base_url": server.url,
        "request_timeout": 5,
        "proxy": None,
        "verify": True,
        "transport": None,
    }
    return Wire(resolve_client_settings(**{**options, **given}))


def hang_up_on_the_second(wire, request):
    """Answer the first request of the first connection, and end it at the second, unanswered."""
    if wire.number == 1 and len(wire.server.requests) > 1:
        return True
    return wire.accept(request)


def test_the_end_of_an_old_connection_is_no_outage(queue_for, until, caplog):
    """A request whose kept-alive connection ends before any answer is made again at once: no wait, no
    warning, and no failed attempt is held against the activity.
    """
    with RawServer(hang_up_on_the_second) as server, caplog.at_level(logging.INFO, "perqueue"):
        queue = queue_for(server)
        queue.record("G", "USER_1").wait(10)
        queue.record("G", "USER_2")
        until(lambda: queue.stats().delivered == 2)
        assert server.requests == [(1, "USER_1"), (1, "USER_2"), (2, "USER_2")]
        assert not caplog.records


def test_the_end_of_a_new_connection_is_no_answer(queue_for, until):
    """A connection that ends at its first request is the server's failure: nothing is asked again at once."""

    def hang_up(wire, request):
        return True

    with RawServer(hang_up) as server:
        queue = queue_for(server)
        queue.record("G", "USER_1")
        until(lambda: queue.stats().reason is not None)
        assert ENDED.search(queue.stats().reason)
        assert len(server.requests) == 1


def test_one_call_of_the_bare_api_is_one_request():
    """Without an outbox nothing is asked twice: whoever calls decides about a repeat."""

    async def main():
        with RawServer(hang_up_on_the_second) as server:
            wire = wire_to(server)
            assert (await wire.add(ACTIVITY)).verdict is Verdict.ACCEPTED
            outcome = await wire.add(ACTIVITY)
            assert outcome.verdict is Verdict.NO_ANSWER
            assert ENDED.search(outcome.reason)
            assert len(server.requests) == 2
            assert (await wire.deliver(ACTIVITY)).verdict is Verdict.ACCEPTED
            await wire.aclose()

    asyncio.run(main())


def test_a_report_is_asked_for_again_when_an_old_connection_ends():
    """A report changes nothing, so the end of an old connection is nothing that its reader must know."""
    body = b'{"ok": true, "result": {"start": null, "end": null, "activityTypes": {}}}'

    def hang_up(wire, request):
        if wire.number == 1 and len(wire.server.requests) > 1:
            return True
        return wire.send(answer_to(request, body))

    with RawServer(hang_up) as server, PerClient(base_url=server.url, reporting_token="token-2") as client:
        assert client.get_report().rows() == []
        assert client.get_report().rows() == []
        assert len(server.requests) == 3
