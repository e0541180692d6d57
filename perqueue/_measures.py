"""What a process measures of itself, in plain numbers: nothing here calls anybody else's code.

``record()`` and the drain only ever count and remember here. Whoever collects metrics fetches it, on a
thread of its own: so no meter that is slow, hangs or raises can get in their way. The SDK's own instruments
would: they take a lock that a signal handler cannot enter again and a forked child may find taken for good,
and a histogram costs as much as ``record()`` itself.
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum
from random import random
from time import perf_counter
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from perqueue._activity import Verdict

if TYPE_CHECKING:
    from perqueue._activity import Activity, Outcome

T = TypeVar("T")

SAMPLES = 1000
"""So many durations are remembered from one collection to the next: handing one over takes 6 µs."""


class Kind(StrEnum):
    """What came of a request: a closed set, whatever Per's words or the network's errors are."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    RETRIED = "retried"
    """Not Per's answer about the activity: it stays pending."""


class Error(StrEnum):
    """Why a request brought no acceptance: a closed set, too."""

    REFUSED = "refused"
    """Per refused the activity."""
    BAD_TOKEN = "bad_token"  # noqa: S105 - a reason, no secret
    NO_TOKEN = "no_token"  # noqa: S105 - a reason, no secret
    """The token's callable failed."""
    RATE_LIMITED = "rate_limited"
    UNAVAILABLE = "unavailable"
    """Per answered, and asked in words for another try later."""
    HTTP_3XX = "http_3xx"
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"
    NOT_PER = "not_per"
    """Something answered that is not Per."""
    TIMEOUT = "timeout"
    NAME = "name_resolution"
    CONNECT = "connect"
    TLS = "tls"
    CONNECTION = "connection"
    """The connection ended before the answer."""
    OTHER = "other"


_STATUS = {3: Error.HTTP_3XX, 4: Error.HTTP_4XX, 5: Error.HTTP_5XX}
_WORDS = (  # the first that fits; what the wire says where there was no answer
    (Error.CONNECTION, re.compile(r".*the connection ended")),
    (Error.TIMEOUT, re.compile(r"no answer within |\w*Timeout\b|TimeoutError")),
    (Error.NOT_PER, re.compile(r"not an answer of Per's|NotHTTP|\w*ProtocolError|DecodingError")),
    (Error.TLS, re.compile(r"the server's certificate|.*\bSSL|.*CERTIFICATE_VERIFY_FAILED")),
    (
        Error.NAME,
        re.compile(r".*(name resolution|Name or service|No address associated|getaddrinfo|gaierror)"),
    ),
    (
        Error.CONNECT,
        re.compile(r"ConnectError|ConnectionRefused|ProxyError|.*(unreachable|No route to host)"),
    ),
    (
        Error.CONNECTION,
        re.compile(r"Connection\w*Error|BrokenPipe|(Read|Write|Close)Error|StaleConnection|OSError"),
    ),
)


def kind_of(outcome: Outcome) -> Kind:
    """Return what came of a request."""
    return {Verdict.ACCEPTED: Kind.ACCEPTED, Verdict.REJECTED: Kind.REJECTED}.get(
        outcome.verdict, Kind.RETRIED
    )


def error_of(outcome: Outcome) -> Error | None:
    """Return why a request brought no acceptance; None if it did."""
    match outcome.verdict:
        case Verdict.ACCEPTED:
            return None
        case Verdict.REJECTED:
            return Error.REFUSED
        case Verdict.BAD_TOKEN:
            return Error.NO_TOKEN if outcome.status is None else Error.BAD_TOKEN
        case Verdict.RATE_LIMITED:
            return Error.RATE_LIMITED
        case _:
            return _error_without_answer(outcome.status, outcome.reason or "")


def _error_without_answer(status: int | None, reason: str) -> Error:
    if status is None:
        return next((error for error, words in _WORDS if words.match(reason)), Error.OTHER)
    if not reason.startswith(f"HTTP {status}"):  # but in Per's own words
        return Error.UNAVAILABLE
    return _STATUS.get(status // 100, Error.NOT_PER)


class Sample(Generic[T]):
    """Some of many values, each as likely to be among them as any other (Vitter's Algorithm R).

    Without a lock: a value that comes in the instant of :meth:`take` may be missed, and that is all.
    """

    def __init__(self) -> None:
        self._values: list[T] = []
        self._seen = 0

    def add(self, value: T) -> None:
        """Remember one, perhaps instead of an earlier one."""
        self._seen = seen = self._seen + 1
        if seen <= SAMPLES:
            self._values.append(value)
            return
        values, place = self._values, int(random() * seen)  # noqa: S311 - no secret
        if place < len(values):
            values[place] = value

    def take(self) -> list[T]:
        """Return what is remembered, and forget it."""
        values, self._values, self._seen = self._values, [], 0
        return values


class Measures:
    """What one process did with one outbox."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, in a forked child: what its parent did is the parent's to report."""
        self.recorded: Sample[float] = Sample()
        """Seconds that ``record()`` took, where it stored something."""
        # With their zeros: who computes rates would miss the first of a series that begins with it.
        self.not_recorded: Counter[str] = Counter(OutboxError=0, OutboxFull=0)
        """How often it failed to store something, by the exception's name."""
        self.requests: Counter[tuple[Kind, Error | None]] = Counter({(Kind.ACCEPTED, None): 0})
        """How many requests ended, and how."""
        self.requested: Sample[tuple[float, Kind]] = Sample()
        """Seconds that they took."""

    def ended(self, outcome: Outcome, seconds: float) -> None:
        """Count a request; called on the drain's thread only."""
        kind = kind_of(outcome)
        self.requests[kind, error_of(outcome)] += 1
        self.requested.add((seconds, kind))


class Deliverer(Protocol):
    """Delivers activities (see :class:`perqueue._delivery.worker.Deliverer`)."""

    async def deliver(self, activity: Activity) -> Outcome: ...

    async def aclose(self) -> None: ...


class MeasuredDeliverer:
    """Delivers, and measures that."""

    def __init__(self, deliverer: Deliverer, measures: Measures) -> None:
        self._deliverer = deliverer
        self._measures = measures
        self.aclose = deliverer.aclose

    async def deliver(self, activity: Activity) -> Outcome:
        """Send one and return what came of it."""
        began = perf_counter()
        outcome = await self._deliverer.deliver(activity)
        self._measures.ended(outcome, perf_counter() - began)
        return outcome
