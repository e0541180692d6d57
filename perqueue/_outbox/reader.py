"""A connection of its own for long reads: many short ones, so that nobody who writes has to wait.

A read transaction keeps the write-ahead log from being emptied. So whoever reads much reads a range of
keys at a time, each to its end, and pauses in between.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from perqueue import _fork, _threads
from perqueue._outbox.connection import connect_to_read, retry_busy, storage_errors

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import Self

SLICE = 5000
"""Keys that are looked at in one read: some milliseconds."""
_GAP = 5e-4
"""Seconds between two slices, in which the write-ahead log can be emptied."""
_NEXT = "SELECT min(id) FROM perqueue_activity WHERE id > ?"


class Reader:
    """Reads an outbox file beside whoever writes to it, and never writes to it itself.

    Every method may raise :class:`~perqueue.OutboxError`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = _threads.RLock()
        self._connection: sqlite3.Connection | None = None
        _fork.participate(self)

    def rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of a query that is bounded by keys."""
        with self._lock, storage_errors(self._path):
            connection = self._usable()
            return retry_busy(lambda: connection.execute(query, values).fetchall())

    def row(self, query: str, values: Sequence[object] = ()) -> tuple[Any, ...] | None:
        """Return the first row."""
        return next(iter(self.rows(query, values)), None)

    def slices(self, after: int, through: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of keys, both ends included, that hold all activities above ``after``, in order."""
        while (row := self.row(_NEXT, (after,))) is not None and row[0] is not None and row[0] <= through:
            after = min(row[0] + SLICE - 1, through)
            yield row[0], after
            time.sleep(_GAP)

    def _usable(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = connect_to_read(self._path)
        return self._connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with _fork.quiet, self._lock:
            self._close()
            _fork.withdraw(self)

    def before_fork(self) -> None:
        """Close the connection: SQLite's locks and connections cannot cross a fork."""
        self._lock.acquire()
        self._close()

    def after_fork_in_parent(self) -> None:
        """Let the next use open it again."""
        self._lock.release()

    def after_fork_in_child(self) -> None:
        """Start with a lock that no lost thread can hold."""
        self._lock = _threads.RLock()
