"""What perqueue runs on, and what the environment tells it."""

from __future__ import annotations

import platform
import sqlite3
import ssl
from functools import partial
from typing import TYPE_CHECKING

from perqueue._activity import checked_id
from perqueue._outbox.connection import _OLDEST_SQLITE
from perqueue._outbox.finding import ok, problem, warning
from perqueue._settings import checked_base_url, flag, origin_of, outbox_place
from perqueue._version import __version__
from perqueue.exceptions import PerQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from perqueue._outbox.finding import Finding

Version = tuple[int, ...]
# https://sqlite.org/wal.html#walresetbug: 3.7.0 to 3.51.2; mended in 3.51.3, and in 3.44.6 and 3.50.7.
_WAL_RESET_BUG: tuple[tuple[Version, Version], ...] = (
    ((3, 7, 0), (3, 44, 6)),
    ((3, 45, 0), (3, 50, 7)),
    ((3, 51, 0), (3, 51, 3)),
)


_VARIABLES: Mapping[str, Callable[[str], object]] = {
    "PERQUEUE_OUTBOX": outbox_place,
    "PERQUEUE_DRAIN": flag,
    "PER_BASE_URL": checked_base_url,
    "PER_ACTIVITY_TYPE_ID": partial(checked_id, "activity_type_id"),
    "ACTIVITY_TYPE_ID": partial(checked_id, "activity_type_id"),
}
_ELSEWHERE = "correct it where the programs get it from"


def look(environ: Mapping[str, str], origin: str | None, *, in_file: bool) -> Iterator[Finding]:
    """Look at the versions, and at the variables that programs with this environment would get.

    ``origin`` is the outbox's own; ``in_file`` says that it is one of SQLite's.
    """
    yield ok("perqueue", f"{__version__}, Python {platform.python_version()}, {ssl.OPENSSL_VERSION}")
    if in_file:
        yield sqlite(sqlite3.sqlite_version_info, sqlite3.threadsafety)
    yield from variables(environ, origin)


def sqlite(version: Version, threadsafety: int) -> Finding:
    """Judge a version of SQLite."""
    text = f"SQLite {'.'.join(map(str, version))}"
    if version < _OLDEST_SQLITE:
        return problem("sqlite", f"{text} is too old for perqueue", "use SQLite 3.37 or newer")
    if not threadsafety:
        return problem("sqlite", f"{text} is built without threads", "use a build that is safe with threads")
    if any(first <= version < mended for first, mended in _WAL_RESET_BUG):
        text += " has the WAL-reset bug, which can damage a file; perqueue avoids it in files of its own"
        return warning("sqlite", text, "let no other program write to the file, or use SQLite 3.51.3")
    return ok("sqlite", text)


def variables(environ: Mapping[str, str], origin: str | None) -> Iterator[Finding]:
    """Judge the variables that are set, tokens apart."""
    # Of PERQUEUE_DRAIN alone the empty text is an error, and not as good as none.
    given = [name for name in _VARIABLES if name in environ and (environ[name] or name == "PERQUEUE_DRAIN")]
    sound = True
    for name in given:
        try:
            _VARIABLES[name](environ[name])
        except PerQueueError as error:
            sound = False
            yield problem("variables", f"{name}: {error}", _ELSEWHERE)
    if not sound:
        return
    url = environ.get("PER_BASE_URL")
    if url and origin is not None and origin_of(url) != origin:
        text = f"PER_BASE_URL is of {origin_of(url)}, and the outbox of {origin}: programs refuse it"
        yield problem(
            "variables", text, "set the PER_BASE_URL that the outbox was made for, or another outbox"
        )
    else:
        yield ok("variables", f"{', '.join(given)}: well-formed" if given else "none of perqueue's is set")
