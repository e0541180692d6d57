"""What Per's answers mean: one total map from everything that HTTP can bring to an outcome."""

from __future__ import annotations

import json
import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

from perqueue._activity import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Headers(Protocol):
    """An answer's headers, as far as they are looked at."""

    def get(self, name: str, default: str = ..., /) -> str:
        """Return a header by its name in lower case; several of one name are joined with commas."""


BAD_TOKEN_REASON = "invalid_auth_token"  # noqa: S105 - what Per says of one
_LONGEST_REASON = 500
_NO_ANSWER_STATUS = frozenset({408, 425})
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_-]+")
"""Where ``rateLimited``, ``DBTimeout`` and ``service_unavailable`` are written together."""
_TRANSIENT = re.compile(
    r"\b(rate|limit|throttl|too many|time out|timed out|unavailable|internal|maintenance|try again|retry)"
    r"|timeout",
    re.IGNORECASE,
)
_LISTED = re.compile(r"(?:[a-z]+,\s*)?[^,]+", re.IGNORECASE)
"""One value of a header that came several times: a number, or a date, which has a comma of its own."""


def interpret(  # noqa: PLR0911 - one return for each row of the table
    status: int,
    headers: Headers,
    body: bytes,
    now: float,
    *,
    redact: Callable[[str], str] = str,
) -> Outcome:
    """Return the outcome of an answer to ``activities.add``; ``now`` is the wall clock, for dates.

    ``redact`` removes from Per's words what must not be shown; the verdict is that of the words as they came.

    | answer | outcome |
    |---|---|
    | 401, 403, or ``invalid_auth_token`` with any status | bad token |
    | 429 | rate limited |
    | 408, 425, 5xx | no answer (503 with ``Retry-After``: rate limited) |
    | 2xx, ``ok: true`` with a transaction ID | accepted |
    | 2xx or 4xx, ``ok: false``, the reason speaks of limits or a passing fault | no answer |
    | 2xx or 4xx, ``ok: false`` | rejected |
    | anything else | no answer |
    """
    answer = parse_json(body)
    ok = answer.get("ok") if answer else None
    if ok is True and 200 <= status < 300:
        return _accepted(status, answer)
    said = reasons_of(answer) if answer else []
    reason = redact(said[0])[:_LONGEST_REASON] if said else None
    if status in (401, 403) or (ok is False and BAD_TOKEN_REASON in said):
        return Outcome(verdict=Verdict.BAD_TOKEN, reason=reason or f"HTTP {status}", status=status)
    in_words = (f"HTTP {status}" + (f": {reason}" if reason else ""))[:_LONGEST_REASON]
    if status in (429, 503):
        wait = retry_after(headers, now)
        if status == 429 or wait is not None:
            return Outcome(verdict=Verdict.RATE_LIMITED, reason=in_words, retry_after=wait, status=status)
    if status in _NO_ANSWER_STATUS or not (200 <= status < 300 or 400 <= status < 500):
        return Outcome(verdict=Verdict.NO_ANSWER, reason=in_words, status=status)
    if ok is False:
        if any(_TRANSIENT.search(_BETWEEN_WORDS.sub(" ", words)) for words in said):
            return Outcome(verdict=Verdict.NO_ANSWER, reason=reason, status=status)
        return Outcome(verdict=Verdict.REJECTED, reason=reason or "no reason given", status=status)
    return Outcome(verdict=Verdict.NO_ANSWER, reason=f"HTTP {status}, not an answer of Per's", status=status)


def _accepted(status: int, answer: Mapping[str, Any] | None) -> Outcome:
    transaction_id = _transaction_id(answer)
    if transaction_id is not None:
        return Outcome(verdict=Verdict.ACCEPTED, transaction_id=transaction_id, status=status)
    reason = f"HTTP {status}: ok, but without a transaction ID"
    return Outcome(verdict=Verdict.NO_ANSWER, reason=reason, status=status)


def parse_json(body: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None for anything else, however malformed."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def reasons_of(answer: Mapping[str, Any]) -> list[str]:
    """Return why Per said no: its documentation shows ``message``, its Node.js wrapper reads ``error``.

    Both count, and the first is the one to show.
    """
    given = [value for key in ("message", "error") if (value := answer.get(key)) is not None]
    # In full: whoever shows it takes the token out first, which a cut might leave in part.
    said = [presentable(v if isinstance(v, str) else json.dumps(v), longest=None) for v in given]
    return [words for words in said if words]


def presentable(text: str, *, longest: int | None = _LONGEST_REASON) -> str:
    """Make a foreign text fit to be stored and shown: one line, valid Unicode, not endless."""
    if text.isascii() and text.isprintable():
        return text.strip()[:longest]
    clean = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else " " for c in clean).strip()[:longest]


def _transaction_id(answer: Mapping[str, Any] | None) -> str | None:
    """Return ``result.transactionId`` (documentation) or ``result.id`` (home page), as Per sent it."""
    result = answer.get("result") if answer else None
    if not isinstance(result, dict):
        return None
    for key in ("transactionId", "id"):
        value = result.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and presentable(value):
            return value.encode("utf-8", "replace").decode()  # only a lone surrogate cannot be kept
    return None


def retry_after(headers: Headers, now: float) -> float | None:
    """Return the seconds that ``Retry-After`` asks for, given as a number or as a date; None for nonsense.

    A header that came several times arrives as one, joined with commas (RFC 9110, 5.3): the longest counts.
    """
    # By the server's own clock where it says: ours may be wrong.
    here = _http_date(headers.get("date", "")) or now
    waits = [_seconds(text.strip(), here) for text in _LISTED.findall(headers.get("retry-after", ""))]
    return max((wait for wait in waits if wait > 0), default=None)


def _seconds(text: str, now: float) -> float:
    """Return one wait in seconds; 0 for nonsense."""
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)  # endless digits: infinite, which is as long a wait as any that is capped
    until = _http_date(text)
    return 0.0 if until is None else until - now


def _http_date(text: str) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


_MAY_HAVE_COUNTED = re.compile(
    r"no answer |not an answer of Per's|HTTP (2\d\d|408|5(?!03)\d\d)\b|perqueue failed|the transport raised"
    r"|(?!ConnectError|ConnectTimeout|ConnectionRefused)[A-Z]\w*(Error|Timeout|Read)\b"
)
"""The reasons with which requests end that may have reached Per all the same."""


def may_have_counted(reason: str) -> bool:
    """Tell whether Per may have counted a request that ended so: it was sent, and Per did not say no."""
    return _MAY_HAVE_COUNTED.match(reason) is not None
