"""What travels: endpoints, query strings, and answers before they become HTTP."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qs

ACTIVITIES_ADD: Final = "activities.add"
REPORTS_GET: Final = "reports.get"
ENDPOINTS: Final = frozenset({ACTIVITIES_ADD, REPORTS_GET})
JSON_TYPE: Final = "application/json"

Query = Mapping[str, list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One HTTP answer: what Per says, or what a fault makes of it."""

    body: bytes
    status: int = 200
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)


def json_answer(value: Any, *, status: int = 200) -> Answer:
    """Make an answer of `value` as JSON."""
    return Answer(body=json.dumps(value).encode(), status=status)


def accepted(transaction_id: str) -> Answer:
    """Make the answer to an accepted activity, as Per's documentation shows it."""
    return Answer(body=b'{"ok": true, "result": {"transactionId": "%b"}}' % transaction_id.encode())


def refused(reason: str, *, status: int = 200, key: str = "message") -> Answer:
    """Make an answer with `ok: false`; Per sends 200 even then, except for a bad token."""
    return json_answer({"ok": False, key: reason}, status=status)


BAD_TOKEN: Final = refused("invalid_auth_token", status=401)


def parse_query(raw: str) -> Query | None:
    """Decode a query string (form encoding: `+` is a space), or `None` if it is not encoded UTF-8."""
    if not raw.isascii():
        return None
    try:
        return parse_qs(raw, keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        return None


def only(query: Query, name: str) -> str | None:
    """Return the parameter's value if it is there exactly once and is not empty."""
    values = query.get(name)
    return values[0] or None if values is not None and len(values) == 1 else None


def bearer_token(authorization: str | None) -> str | None:
    """Return the token of an `Authorization: Bearer …` header."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
