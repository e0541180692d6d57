"""One activity in a transaction of the application's own: what its connection has to run.

The steps are told, not run, so that any library's connection can run them, awaited or not. Until that
transaction is committed nothing here may remember the activity: it may never have been.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perqueue._activity import checksum
from perqueue._outbox.coalescing import CoalescedSession
from perqueue._outbox.connection import outbox_error
from perqueue._outbox.damage import ROW_IS_MISSING, corrupt
from perqueue.exceptions import ConfigurationError, OutboxFull

if TYPE_CHECKING:
    from collections.abc import Generator

    from perqueue._outbox.protocol import Key, Steps

# Whoever reads first may find, when it comes to writing, that somebody else has written meanwhile: SQLite
# refuses that at once, whatever the timeout. So the first statement writes, and asks on its way. A sum has
# no declared type, for which the application may have a converter (sqlite3's PARSE_DECLTYPES).
_JOIN = (
    "INSERT INTO main.perqueue_activity (billing_id, user_id, activity_type_id, recorded_at, checksum)"
    " SELECT ?, ?, ?, ?, ? FROM main.perqueue_drain"
    " WHERE (SELECT coalesce(max(id), 0) FROM main.perqueue_activity)"
    " - accepted - rejected - discarded - damaged - missing < ?{unless} RETURNING id + 0"
)
_WHERE_STANDING = (
    " FROM main.perqueue_coalesced c"
    " LEFT JOIN main.perqueue_settlement s ON s.activity_id = c.activity_id"
    " WHERE c.window_end = ? AND c.window_start = ?"
    " AND c.billing_id = ? AND c.user_id = ? AND c.activity_type_id = ?"
    " AND coalesce(s.state, 1) = 1"  # pending or accepted
    " AND NOT EXISTS (SELECT 1 FROM main.perqueue_activity a"
    " WHERE a.id = c.activity_id AND a.activity_type_id <> c.activity_type_id)"
)
_JOIN_ALWAYS = _JOIN.format(unless="")
_JOIN_ONCE = _JOIN.format(unless=f" AND NOT EXISTS (SELECT 1{_WHERE_STANDING})")
_STANDING = f"SELECT c.activity_id + 0{_WHERE_STANDING}"
_STAND = "INSERT OR REPLACE INTO main.perqueue_coalesced VALUES (?, ?, ?, ?, ?, ?)"


class JoinedSession(CoalescedSession):
    """An outbox file into which the application's own transactions can record."""

    dialect = "sqlite"

    _max_pending: int

    def joining(
        self,
        key: Key,
        window: tuple[int, int] | None,
        recorded_at: int,
        driven: object,  # noqa: ARG002 - its file may have been renamed since
        *,
        quietly: bool = False,  # noqa: ARG002 - it wakes nobody in any case
    ) -> Steps:
        """Yield what the application's connection has to run, and return the ID of the activity.

        Raises :class:`ConfigurationError` for a connection to something else, :class:`OutboxFull`.
        """
        if self._pid != os.getpid():
            self._foreign()
        if not self._embedded:
            message = "connection= needs an outbox in the application's own database: embedded=True"
            raise ConfigurationError(message)
        self._must_be_main((yield "PRAGMA database_list", ()))
        values = (*key, recorded_at, checksum(*key, recorded_at), self._max_pending)
        if window is None:
            rows = yield _JOIN_ALWAYS, values
            return self._given(rows or (yield from self._why_not()))
        standing = (window[1], window[0], *key)
        rows = yield _JOIN_ONCE, (*values, *standing)
        if not rows:
            rows = yield _STANDING, standing
            return self._given(rows or (yield from self._why_not()))
        activity_id = self._given(rows)
        yield _STAND, (*standing, activity_id)
        return activity_id

    def _must_be_main(self, databases: list[Any]) -> None:
        """Raise unless the outbox's file is the connection's main database.

        By its own name, not another link to it: SQLite names the journal beside it by that. An attached one
        will not do: in WAL mode a transaction over two files is not atomic.
        """
        main = next((row[2] for row in databases if row[0] == 0), None)
        if main == self._file:
            return
        path = Path(os.fsdecode(main)) if isinstance(main, str | bytes) and main else None
        try:
            if path is None or path.name != self._path.name or not path.parent.samefile(self._path.parent):
                message = f"connection leads to {path or 'no file'}, and the outbox is in {self._path}"
                raise ConfigurationError(message)
        except OSError as error:
            message = f"connection leads to {path}, which is gone"
            raise ConfigurationError(message) from error

    def _why_not(self) -> Generator[tuple[str, tuple[object, ...]], list[Any], list[Any]]:
        """Raise unless the outbox is full."""
        if (yield "SELECT count(*) FROM main.perqueue_drain", ())[0][0]:
            return []
        raise outbox_error(self._path, corrupt(ROW_IS_MISSING))

    def _given(self, rows: list[Any]) -> int:
        if rows:
            return int(rows[0][0])
        message = (
            f"the outbox holds {self._max_pending} undelivered activities or more, which is max_pending:"
            " nothing was stored; `perqueue status` says why they wait"
        )
        raise OutboxFull(message)
