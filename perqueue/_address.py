"""The address of a database: a PostgreSQL URL whose password shows nowhere."""

from __future__ import annotations

import re
from urllib.parse import unquote

from perqueue.exceptions import ConfigurationError

_SCHEMES = ("postgresql://", "postgres://")
_USER_INFO = re.compile(r"(?<=://)([^:@/]*)(?::([^@/]*))?@")  # as libpq has it: a ? or # may be in it
_SECRETS = re.compile(r"(?<=[?&])((?:ssl)?password|passcode)=([^&]*)", re.IGNORECASE)
_HIDDEN = "***"


class DatabaseURL:
    """A ``postgresql://`` URL, as libpq takes it; its text is without passwords."""

    __slots__ = ("_secrets", "_shown", "dsn")

    def __init__(self, url: str) -> None:
        """Raise :class:`~perqueue.ConfigurationError` if libpq would read it otherwise than it looks."""
        if _is_odd(url) or not url.isprintable() or " " in url:
            message = (
                "the outbox's URL must look like postgresql://user@host/database;"
                " special characters in a password are percent-encoded"
                " (@ is %40, : is %3A, / is %2F, ? is %3F)"
            )
            raise ConfigurationError(message)
        self.dsn = url
        """With the password: for libpq alone."""
        found = [match[2] for match in _USER_INFO.finditer(url)] + [m[2] for m in _SECRETS.finditer(url)]
        raw = [secret for secret in found if secret]
        self._secrets = sorted({*raw, *map(unquote, raw)}, key=len, reverse=True)
        shown = _USER_INFO.sub(lambda m: f"{m[1]}:{_HIDDEN}@" if m[2] is not None else m[0], url)
        self._shown = _SECRETS.sub(lambda m: f"{m[1]}={_HIDDEN}", shown)

    def __str__(self) -> str:
        return self._shown

    def __repr__(self) -> str:
        return f"<DatabaseURL {self._shown}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatabaseURL) and other.dsn == self.dsn

    def __hash__(self) -> int:
        return hash(self.dsn)

    def redact(self, text: str) -> str:
        """Return a text without this URL's passwords."""
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return text


def _is_odd(url: str) -> bool:
    """Tell whether a password may have been cut in two, or hides behind a name written in percents."""
    place, _, query = url.partition("://")[2].partition("?")
    authority, _, name = place.partition("/")
    cut = authority.count("@") > 1 or "@" in name or "@" in query.partition("=")[0]
    return cut or re.search(r"%[^=&]*=", query) is not None


def is_database_url(outbox: object) -> bool:
    """Tell whether an outbox is named by the URL of a database."""
    return isinstance(outbox, str) and outbox.startswith(_SCHEMES)
