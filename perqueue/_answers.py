"""What Per's answers mean: one total map from everything that HTTP can bring to an outcome."""

from __future__ import annotations

import json
import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from perqueue._activity import Outcome, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BAD_TOKEN_REASON = "invalid_auth_token"  # noqa: S105 - what Per says of one
_LONGEST_REASON = 500
_NO_ANSWER_STATUS = frozenset({408, 425})
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|[_-]+")
_TRANSIENT = re.compile(
    r"\b(rate|limit|throttl|too many|time ?out|timed out|unavailable|internal|maintenance|try again|retry)",
    re.IGNORECASE,
)


def interpret(  # noqa: PLR0911 - one return for each row of the table
    status: int,
    headers: Mapping[str, str],
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
    words = reason_of(answer) if answer else None
    reason = redact(words)[:_LONGEST_REASON] if words else None
    if status in (401, 403) or (ok is False and words == BAD_TOKEN_REASON):
        return Outcome(verdict=Verdict.BAD_TOKEN, reason=reason or f"HTTP {status}", status=status)
    in_words = (f"HTTP {status}" + (f": {reason}" if reason else ""))[:_LONGEST_REASON]
    if status in (429, 503):
        wait = retry_after(headers, now)
        if status == 429 or wait is not None:
            return Outcome(verdict=Verdict.RATE_LIMITED, reason=in_words, retry_after=wait, status=status)
    if status in _NO_ANSWER_STATUS or not (200 <= status < 300 or 400 <= status < 500):
        return Outcome(verdict=Verdict.NO_ANSWER, reason=in_words, status=status)
    if ok is True and status < 300:
        transaction_id = _transaction_id(answer)
        if transaction_id is not None:
            return Outcome(verdict=Verdict.ACCEPTED, transaction_id=transaction_id, status=status)
        reason = f"HTTP {status}: ok, but without a transaction ID"
        return Outcome(verdict=Verdict.NO_ANSWER, reason=reason, status=status)
    if ok is False:
        if _TRANSIENT.search(_CAMEL.sub(" ", words or "")):
            return Outcome(verdict=Verdict.NO_ANSWER, reason=reason, status=status)
        return Outcome(verdict=Verdict.REJECTED, reason=reason or "no reason given", status=status)
    return Outcome(verdict=Verdict.NO_ANSWER, reason=f"HTTP {status}, not an answer of Per's", status=status)


def parse_json(body: bytes) -> dict[str, Any] | None:
    """Return a JSON object; None for anything else, however malformed."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return answer if isinstance(answer, dict) else None


def reason_of(answer: Mapping[str, Any]) -> str | None:
    """Return why Per said no: its documentation shows ``message``, its Node.js wrapper reads ``error``."""
    for key in ("message", "error"):
        value = answer.get(key)
        if value not in (None, ""):
            # In full: whoever shows it takes the token out first, which a cut might leave in part.
            return presentable(value if isinstance(value, str) else json.dumps(value), longest=None)
    return None


def presentable(text: str, *, longest: int | None = _LONGEST_REASON) -> str:
    """Make a foreign text fit to be stored and shown: one line, valid Unicode, not endless."""
    clean = text.encode("utf-8", "replace").decode()
    return "".join(c if c.isprintable() else " " for c in clean).strip()[:longest]


def _transaction_id(answer: Mapping[str, Any] | None) -> str | None:
    """Return ``result.transactionId`` (documentation) or ``result.id`` (home page)."""
    result = answer.get("result") if answer else None
    if not isinstance(result, dict):
        return None
    for key in ("transactionId", "id"):
        value = result.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and presentable(value):
            return presentable(value)
    return None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that ``Retry-After`` asks for, given as a number or as a date; None for nonsense."""
    text = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        seconds = float(text)  # endless digits: infinite, which is as long a wait as any that is capped
    else:
        until = _http_date(text)
        if until is None:
            return None
        # By the server's own clock where it says: ours may be wrong.
        seconds = until - (_http_date(headers.get("date", "")) or now)
    return seconds if seconds > 0 else None


def _http_date(text: str) -> float | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    try:
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None
