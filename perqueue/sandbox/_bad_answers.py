"""Faults that answer something other than Per would."""

from dataclasses import dataclass, field
from typing import Literal

from perqueue.sandbox._fault import Fault


@dataclass(frozen=True)
class RateLimited(Fault):
    """429, whatever the rate."""

    name = "rate_limited"
    retry_after: float | str | None = None
    """Seconds, or any text (nonsense too); `None`: no such header."""
    as_date: bool = False
    """Send the seconds as an HTTP date, that far in the future by the real clock."""


@dataclass(frozen=True)
class RateLimit(Fault):
    """A real limiter: 429 (`rate_limited` in the log) beyond so many requests per second."""

    name = "rate_limit"
    per_second: float
    burst: int | None = None
    """How many may come at once after a pause; `None`: those of one second."""
    retry_after: bool = True
    """Say when to come back, in whole seconds."""


@dataclass(frozen=True)
class Status(Fault):
    """Any HTTP status with any body: 500, 502, 503 with `Retry-After`, 204, …"""

    name = "status"
    code: int = 500
    body: str = "something broke"
    content_type: str = "text/plain"
    retry_after: float | str | None = None
    as_date: bool = False
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Refuse(Fault):
    """`{"ok": false, "message": reason}`: Per says no, with status 200 as it does at present."""

    name = "refuse"
    reason: str = "refused"
    key: Literal["message", "error"] = "message"
    """The documentation shows `message`, the Node.js wrapper reads `error`."""
    status: int = 200


@dataclass(frozen=True)
class BadToken(Fault):
    """The documented `{"ok": false, "message": "invalid_auth_token"}`, though the token is good."""

    name = "bad_token"
    status: int = 401


@dataclass(frozen=True)
class Html(Fault):
    """A page for humans, as captive portals and proxies send it."""

    name = "html"
    status: int = 200
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class Redirect(Fault):
    """Come again elsewhere."""

    name = "redirect"
    location: str = "http://127.0.0.1:9/elsewhere"
    status: int = 302
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class OkWithoutResult(Fault):
    """`{"ok": true}` and no transaction ID."""

    name = "ok_without_result"
    accept: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ResultId(Fault):
    """Success with `result.id`, as in the example on Per's home page, for `result.transactionId`."""

    name = "result_id"
    accept: bool = field(default=True, init=False, repr=False)


@dataclass(frozen=True)
class TruncatedJson(Fault):
    """A complete HTTP answer whose JSON stops half-way."""

    name = "truncated_json"
    accept: bool = field(default=True, kw_only=True)
