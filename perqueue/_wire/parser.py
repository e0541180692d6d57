"""HTTP/1.1 as bytes: h11 reads and writes it, or httptools (the extra ``fast``) where it is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import h11

if TYPE_CHECKING:
    from collections.abc import Sequence

    RawHeaders = Sequence[tuple[bytes, bytes]]

_ENDED = "the connection ended before the answer was complete"
_LARGEST_HEAD = 64 * 1024
"""Bytes of status line and headers, beyond which an answer is none."""


class NotHTTP(Exception):
    """What came is not HTTP, or not all of an answer, or too much of one."""


class Answer:
    """What a server answered: its status, its headers, and the body as far as it has come."""

    __slots__ = ("_raw", "body", "status")

    def __init__(self, status: int, raw: RawHeaders) -> None:
        self.status = status
        self.body = bytearray()
        self._raw = raw

    def get(self, name: str, default: str = "") -> str:
        """Return a header by its name in lower case; several of one name are joined with commas."""
        key = name.encode()
        values = [value.strip() for each, value in self._raw if each.lower() == key]
        return b", ".join(values).decode("latin-1") if values else default


class Parser(Protocol):
    """Writes one request at a time and reads its answer."""

    answer: Answer | None
    """The answer to the latest request, once its headers have come."""

    def request(self, target: bytes, headers: RawHeaders, largest: int) -> bytes:
        """Return the bytes of a GET whose answer's body has at most ``largest`` bytes."""

    def feed(self, data: bytes) -> bool:
        """Take what came (nothing: the connection has ended) and tell whether the answer is complete.

        Raises :class:`NotHTTP`, also for an end before it is.
        """

    def keeps_alive(self) -> bool:
        """Tell, after an answer, whether the connection may carry another request."""


def _written(target: bytes, headers: RawHeaders) -> bytes:
    """Return the bytes of a GET; whoever calls has seen to it that no part has a line's end in it."""
    return b"GET %b HTTP/1.1\r\n%b\r\n" % (target, b"".join([b"%b: %b\r\n" % each for each in headers]))


_ASKED = h11.Request(method="GET", target="/", headers=[("Host", "per")])
_ASKED_ALL = h11.EndOfMessage()


class H11Parser:
    """h11: pure Python, there wherever httpx is.

    Its answers are read to the letter; of a request it is told only that there is one: to write each, too,
    would cost a sixth of all that delivering an activity does.
    """

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
        self._largest = self._head = 0
        self.answer: Answer | None = None

    def request(self, target: bytes, headers: RawHeaders, largest: int) -> bytes:
        """See :class:`Parser`."""
        connection = self._connection
        if connection.our_state is h11.DONE:
            connection.start_next_cycle()
        self.answer = None
        self._largest, self._head = largest, 0
        connection.send(_ASKED)
        connection.send(_ASKED_ALL)
        return _written(target, headers)

    def feed(self, data: bytes) -> bool:
        """See :class:`Parser`."""
        try:
            self._connection.receive_data(data)
            complete = self._read()
        except h11.RemoteProtocolError as error:
            # What follows the colon quotes the server, which may repeat the token.
            raise NotHTTP(str(error).partition(":")[0] if data else _ENDED) from None
        if not data and not complete:
            raise NotHTTP(_ENDED)
        self._head += len(data) if self.answer is None else 0
        if self._head > _LARGEST_HEAD:  # of informational answers, say
            raise NotHTTP(_too_long(_LARGEST_HEAD))
        return complete

    def _read(self) -> bool:
        while True:
            event = self._connection.next_event()
            if isinstance(event, h11.Data):
                assert self.answer is not None  # noqa: S101 - for the type checker
                self.answer.body += event.data
                if len(self.answer.body) > self._largest:
                    raise NotHTTP(_too_long(self._largest))
            elif isinstance(event, h11.Response):
                self.answer = Answer(event.status_code, event.headers.raw_items())
            elif isinstance(event, h11.EndOfMessage):
                return True
            elif not isinstance(event, h11.InformationalResponse):
                return False  # more is needed; or it switches to another protocol, and no answer will come

    def keeps_alive(self) -> bool:
        """See :class:`Parser`."""
        connection = self._connection
        done = connection.our_state is h11.DONE and connection.their_state is h11.DONE
        return done and not connection.trailing_data[0]


class HttptoolsParser:
    """httptools: Node.js's parser, in C. Five times faster."""

    def __init__(self) -> None:
        import httptools

        self._new = httptools.HttpResponseParser
        self._errors = (httptools.HttpParserError, httptools.HttpParserUpgrade)
        self._parser: Any = None
        self._largest = 0
        self.answer: Answer | None = None

    def request(self, target: bytes, headers: RawHeaders, largest: int) -> bytes:
        """See :class:`Parser`."""
        self.answer = None
        self._largest = largest
        self._parser = self._new(self)
        self._raw: list[tuple[bytes, bytes]] = []
        self._head = self._all = 0
        self._complete = self._trailing = self._has_length = False
        return _written(target, headers)

    def feed(self, data: bytes) -> bool:
        """See :class:`Parser`."""
        if not data:
            if self.answer is None or self._has_length:
                raise NotHTTP(_ENDED)
            return True  # a body that lasts until the connection ends
        self._all += len(data)
        self._head += len(data) if self.answer is None else 0
        try:
            self._parser.feed_data(data)
        except self._errors as error:
            if not self._complete:
                raise NotHTTP(f"not HTTP/1.1: {type(error).__name__}") from None
            self._trailing = True
        if self.answer is None and self._head > _LARGEST_HEAD:
            raise NotHTTP(_too_long(_LARGEST_HEAD))
        # Of trailers and chunks' extensions there is no end, either.
        if self.answer is not None and (
            len(self.answer.body) > self._largest or self._all > _LARGEST_HEAD + 2 * self._largest
        ):
            raise NotHTTP(_too_long(self._largest))
        return self._complete

    def keeps_alive(self) -> bool:
        """See :class:`Parser`."""
        return self._complete and self._keep_alive and not self._trailing

    # what the parser calls

    def on_message_begin(self) -> None:
        """One answer for one request: a second one is nobody's."""
        if self._complete:
            self._trailing = True
        self._raw = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete; what comes after the body is none."""
        if self.answer is None:
            self._raw.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is complete."""
        status = self._parser.get_status_code()
        if self._complete or status < 200:
            return
        names = {name.lower() for name, _ in self._raw}
        self._has_length = bool(names & {b"content-length", b"transfer-encoding"})
        self.answer = Answer(status, self._raw)

    def on_body(self, data: bytes) -> None:
        """A part of the body has come."""
        if self.answer is not None and not self._complete:
            self.answer.body += data

    def on_message_complete(self) -> None:
        """The answer is complete, unless it was an informational one before it."""
        if self.answer is not None and not self._complete:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()


def _too_long(largest: int) -> str:
    return f"more than {largest} bytes"


def new_parser() -> Parser:
    """Return the fastest parser that is installed."""
    global _choice  # noqa: PLW0603 - a failing import is costly: once
    if _choice is None:
        try:
            HttptoolsParser()
            _choice = HttptoolsParser
        except ImportError:
            _choice = H11Parser
    return _choice()


_choice: type[Parser] | None = None
