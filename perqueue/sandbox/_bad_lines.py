"""Faults that deliver the true answer badly: late, in part, or not at all."""

from dataclasses import dataclass, field

from perqueue.sandbox._fault import Fault


@dataclass(frozen=True)
class Latency(Fault):
    """The true answer, so many seconds late. The activity counts even if its client has given up by then."""

    name = "latency"
    seconds: float = 1.0
    accept: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True)
class Drip(Fault):
    """The true answer, one byte of the body at a time: no read ever times out, yet it takes for ever."""

    name = "drip"
    interval: float = 0.1
    """Seconds between two bytes."""
    accept: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True)
class HugeBody(Fault):
    """The true answer, followed by spaces up to `size` bytes: still valid JSON."""

    name = "huge_body"
    size: int = 100_000_000
    accept: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True)
class CloseAfterAnswer(Fault):
    """The true answer on a connection said to stay open, which is then closed without a word."""

    name = "close_after_answer"
    accept: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True)
class HalfBody(Fault):
    """Half of a good answer, under the `Content-Length` of the whole, then the end of the connection."""

    name = "half_body"
    accept: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Hang(Fault):
    """No answer for `seconds`, or until `release()`; then the true one if the activity counts, else none."""

    name = "hang"
    seconds: float | None = None
    """`None`: until it is released, or the sandbox stops."""
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Disconnect(Fault):
    """The connection is closed politely, without any answer."""

    name = "disconnect"
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ResetBeforeAccepting(Fault):
    """A TCP reset; the activity does not count."""

    name = "reset_before_accepting"


@dataclass(frozen=True)
class ResetAfterAccepting(Fault):
    """The activity counts, and then a TCP reset comes instead of the answer."""

    name = "reset_after_accepting"
    accept: bool = field(default=True, init=False, repr=False)
