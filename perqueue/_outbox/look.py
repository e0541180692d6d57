"""Looking at an outbox from outside: nothing is written, and nothing stays open from one look to the next.

Who looks again and again must not keep SQLite's locks meanwhile (the file could not be moved, salvaged or
taken for unused), and must not be the last to close it, who empties the write-ahead log.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from perqueue._activity import State
from perqueue._outbox.connection import connect_to_read, retry_busy, set_up, storage_errors
from perqueue._outbox.counts import Positions
from perqueue._outbox.damage import corrupt, is_corrupt, one_row
from perqueue._place import real_path

if TYPE_CHECKING:
    from pathlib import Path

    from perqueue._outbox.protocol import Position

NEWEST = 300
"""How many answers, failures and refusals are looked at: the cost of a look, whatever the file holds."""

_OUTBOX = "SELECT outbox_id, origin FROM perqueue_outbox"
_NEXT_DUE = "SELECT min(not_before) FROM perqueue_retry"
_ANSWERS = "SELECT settled_at, duration_ms, state FROM perqueue_settlement ORDER BY activity_id DESC LIMIT ?"
_FAILURES = (
    "SELECT attempted_at + duration_ms, duration_ms, reason FROM perqueue_attempt ORDER BY id DESC LIMIT ?"
)
_REFUSALS = (
    "SELECT settled_at, duration_ms, reason FROM perqueue_settlement"
    " WHERE rejection IS NOT NULL ORDER BY rejection DESC LIMIT ?"
)


class Request(NamedTuple):
    """A request that came to an end."""

    at: int
    """When it ended (milliseconds since the epoch)."""
    duration_ms: int
    reason: str | None = None
    """Why it brought no acceptance; None if it did, or was answered."""


class Look(NamedTuple):
    """An outbox at one moment."""

    outbox_id: str
    origin: str | None
    position: Position
    next_due: int | None
    """The earliest end of an activity's own wait (milliseconds since the epoch)."""
    answers: list[Request]
    """The newest activities that Per answered, by their numbers; so the latest answers, save for retries."""
    failures: list[Request]
    """The newest requests that brought no acceptance."""
    refusals: list[Request]
    """The newest refusals that nobody has requeued or discarded."""
    drainers: tuple[tuple[str, int], ...] | None = None
    """Host and process of everybody who drains; None where only a lock can tell."""


class FileOnlooker(Positions):
    """Looks at one outbox, as often as is wanted."""

    def __init__(self, path: Path) -> None:
        """Raise :class:`~perqueue.OutboxError` if that cannot be looked at, or is none."""
        self._path = real_path(path)
        set_up(self._path, None, create=False)

    def look(self) -> Look:
        """Return how it stands now; raise :class:`~perqueue.OutboxError` if it cannot be read."""
        with storage_errors(self._path):
            if not self._path.stat().st_size:  # SQLite would delete its -wal
                raise corrupt("the file is empty")
            with closing(connect_to_read(self._path)) as connection:
                return retry_busy(lambda: self._look(connection))

    def _look(self, connection: sqlite3.Connection) -> Look:
        outbox_id, origin = one_row(connection, _OUTBOX)
        position = self._position(connection)
        (next_due,) = one_row(connection, _NEXT_DUE)
        answered = (State.ACCEPTED, State.REJECTED, State.DISCARDED)
        answers = [Request(at, ms) for at, ms, state in _newest(connection, _ANSWERS) if state in answered]
        failures = [Request(*row) for row in _newest(connection, _FAILURES)]
        refusals = [Request(*row) for row in _newest(connection, _REFUSALS)]
        return Look(str(outbox_id), origin, position, next_due, answers, failures, refusals)


def _newest(connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]]:
    """Return the rows that make sense; none if a page cannot be read, since the counters still can."""
    try:
        rows = connection.execute(query, (NEWEST,)).fetchall()
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        return []
    return [row for row in rows if isinstance(row[0], int) and isinstance(row[1], int)]
