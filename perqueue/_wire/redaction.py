"""Taking tokens and IDs out of what others wrote, and out of what httpx's own loggers say."""

from __future__ import annotations

import logging
import re
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Callable

_SHORTEST_SECRET = 8
"""Shorter tokens (a test's "x") are taken out as whole words only, or they would spoil every text."""


class Secret(str):
    """A token that a traceback with local variables does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'[token]'"


class Concealed(tuple[tuple[bytes, bytes], ...]):
    """Headers that a traceback with local variables does not show."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "([headers])"


def without_token(text: str, token: str) -> str:
    """Return a foreign text without the token that it may repeat, in a URL's or in a quotation's form too."""
    forms = {str(token), quote(token, safe=""), token.replace("\\", "\\\\")}
    for form in sorted(forms, key=len, reverse=True):
        if len(token) >= _SHORTEST_SECRET:
            text = text.replace(form, "[token]")
        else:
            text = _without_word(text, form, "[token]")
    return text


def redacted(text: str, token: str, *ids: str) -> str:
    """Return a foreign text fit to be logged and raised: without the token and the IDs that it may repeat."""
    text = without_token(text, token)
    for form in {form for value in ids for form in (value, quote(value, safe=""))}:
        text = _without_word(text, form, "…")  # whole words only: an ID may be as short as "a"
    return text


def _without_word(text: str, word: str, instead: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", instead, text)


# A function, since a context's values may be shown by whoever debugs.
_mask: ContextVar[Callable[[str], str] | None] = ContextVar("perqueue_mask", default=None)


class _Mask(logging.Filter):
    """At DEBUG httpcore logs each answer's headers, in which a server may repeat the token."""

    def filter(self, record: logging.LogRecord) -> bool:
        mask = _mask.get()
        if mask is not None:
            record.msg, record.args = mask(record.getMessage()), None
        return True


for _name in ("connection", "http11", "http2", "proxy", "socks"):
    logging.getLogger(f"httpcore.{_name}").addFilter(_Mask())


def mask_logs(*secrets: str) -> None:
    """From here on, in this task, take secrets out of what httpcore logs."""

    def mask(text: str) -> str:
        for secret in secrets:
            text = without_token(text, secret)
        return text

    _mask.set(mask)
