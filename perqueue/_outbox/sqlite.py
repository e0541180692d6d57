"""The outbox in a SQLite file."""

from __future__ import annotations

import functools
import os
import sqlite3
from typing import TYPE_CHECKING, Any

from perqueue._activity import Activity, State, checksum
from perqueue._outbox.alone import Alone
from perqueue._outbox.connection import BUSY_TIMEOUT, is_busy, outbox_error, retry_busy, storage_errors
from perqueue._outbox.damage import ROW_IS_MISSING, corrupt, is_sound, one_row
from perqueue._outbox.protocol import Settled
from perqueue._outbox.queries import (
    APPEND,
    REJECTED_SINCE,
    SETTLED,
)
from perqueue._outbox.session import IDENTITY_INTERVAL_MS, is_owned, release_after_all
from perqueue._outbox.settling import SettlingSession
from perqueue._words import counted
from perqueue.exceptions import OutboxFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path


_FOREVER = 2**62


class SQLiteOutbox(SettlingSession, Alone):
    """An :class:`~perqueue._outbox.protocol.Outbox` in a file of its own, or in an application's."""

    def __init__(
        self,
        path: Path,
        origin: str | None,
        *,
        create: bool = True,
        embedded: bool | None = None,
        power: bool = False,
        max_pending: int = _FOREVER,
    ) -> None:
        self._power = power
        self._max_pending = max_pending
        self._settled_count = 0
        super().__init__(path, origin, create=create, embedded=embedded)
        try:
            self.position()  # a file that makes no sense is not recorded into
        except BaseException:
            self.close()
            raise

    # -- the hot path

    def append(  # noqa: C901, PLR0912 - the hot path is written out: each call in it would cost a tenth of it
        self, billing_id: str, user_id: str, activity_type_id: str, recorded_at: int
    ) -> int:
        """Commit one activity and return its ID."""
        values = (
            billing_id,
            user_id,
            activity_type_id,
            recorded_at,
            checksum(billing_id, user_id, activity_type_id, recorded_at),
        )
        if self._pid != os.getpid():
            self._foreign()
        lock = self._lock
        nested = is_owned(lock)
        try:
            if not nested and not lock.acquire(blocking=False) and not lock.acquire(timeout=BUSY_TIMEOUT):
                self._locked()
            connection = self._connection
            if nested and connection is not None and connection.in_transaction:
                self._in_transaction()
            if connection is None:
                connection = self._usable()
            elif abs(recorded_at - self._checked_at) >= IDENTITY_INTERVAL_MS:
                self._check_identity(recorded_at)
            last_id = self._last_id
            if last_id - self._settled_count >= self._max_pending:
                self._check_room()
            try:
                # The cursor is this call's own, so that a record() from a signal handler in the very
                # next instant cannot change what lastrowid says.
                activity_id: int = connection.execute(APPEND, values).lastrowid  # type: ignore[assignment]
            except (sqlite3.Error, UnicodeDecodeError) as error:
                activity_id = self._append_again(connection, values, error)
            if activity_id <= last_id:
                self._given_again(connection, activity_id)
            self._last_id = activity_id
            self._last = values
            self._disk.committed()
            if not os.access(self._file, os.F_OK):  # deleted or moved away, by the cheapest look there is
                self._check_identity(recorded_at)
        except BaseException:
            if not nested:
                release_after_all(lock)
            raise
        if not nested:
            lock.release()
        if self._power:  # asked here, too: a call costs a twentieth of the whole
            self._sync()
        return activity_id

    def _sync(self) -> None:
        """Return once what was committed is as safe as ``durability`` asks for."""
        if self._power:
            with storage_errors(self._path):
                self._disk.sync()

    def _insert(self, connection: sqlite3.Connection, values: tuple[object, ...]) -> int:
        """Do as :meth:`append`, within a transaction."""
        last_id = self._last_id
        if last_id - self._settled_count >= self._max_pending:
            self._check_room()
        activity_id: int = connection.execute(APPEND, values).lastrowid  # type: ignore[assignment]
        if activity_id <= last_id:
            self._given_again(connection, activity_id)
        return activity_id

    def _given_again(self, connection: sqlite3.Connection, activity_id: int) -> None:
        """Go on if the whole file has gone back; raise if only the highest activities are gone.

        In that case this one would be taken for one that has an outcome.
        """
        with storage_errors(self._path):
            if connection.execute("SELECT 1 FROM perqueue_drain").fetchone() is None:
                # Emptied by the application: alone in there it would be in the way of making all anew.
                connection.execute("DELETE FROM perqueue_activity WHERE id = ?", (activity_id,))
                raise corrupt(ROW_IS_MISSING)
            if self._is_taken(connection, activity_id):
                raise corrupt("a number was given twice")
            self._notice(connection)

    def _went_back(self) -> None:
        super()._went_back()
        self._settled_count = 0

    def _append_again(
        self, connection: sqlite3.Connection, values: tuple[object, ...], error: Exception
    ) -> int:
        """Wait for a lock that another process holds; any other error is final."""
        if isinstance(error, sqlite3.Error) and is_busy(error):
            with storage_errors(self._path):
                cursor = retry_busy(lambda: connection.execute(APPEND, values))
                return cursor.lastrowid  # type: ignore[return-value]
        self._give_up_connection()
        raise outbox_error(self._path, error) from error

    def _check_room(self) -> None:
        position = self.position()
        self._settled_count = position.last_id - position.pending
        if position.pending >= self._max_pending:
            message = (
                f"the outbox holds {counted(position.pending, 'undelivered activity')}, and max_pending is"
                f" {self._max_pending}: nothing was stored; `perqueue status` says why they wait"
            )
            raise OutboxFull(message)

    # -- what there is

    def settled(self, activity_ids: Iterable[int]) -> dict[int, Settled]:
        """Return the outcomes of those that have one."""
        ids = list(activity_ids)
        found: dict[int, Settled] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            query = SETTLED.format(", ".join("?" * len(some)))
            with self._reading() as connection:
                rows = retry_busy(functools.partial(_fetch, connection, query, some))
                self._notice(connection)  # whether these numbers are still whose they were
            for row in filter(is_sound, rows):  # nothing is told that is not Per's word
                activity_id, state, settled_at, transaction_id, reason = row[:5]
                found[activity_id] = Settled(
                    state=State(state), transaction_id=transaction_id, reason=reason, settled_at=settled_at
                )
        return found

    def last_reason(self, activity_id: int) -> str | None:
        """Return why the latest attempt to deliver an activity failed; None if none has."""
        query = "SELECT reason FROM perqueue_attempt WHERE activity_id = ? ORDER BY id DESC LIMIT 1"
        with self._reading() as connection:
            row = retry_busy(lambda: connection.execute(query, (activity_id,)).fetchone())
        return None if row is None else str(row[0])

    def rejected_since(self, rejection: int, limit: int) -> list[Activity]:
        """Return activities that are rejected now, by refusals after a number."""
        with self._reading() as connection:
            rows = retry_busy(lambda: connection.execute(REJECTED_SINCE, (rejection, limit)).fetchall())
        return self._sorted_out(rows)[0]  # these are settled: a damaged one is found if it is requeued

    def change_counter(self) -> int:
        """Return a number that differs when another process has written."""
        # Written for an idle process, which does little else: several times cheaper than _reading().
        with self._lock:
            try:
                (version,) = one_row(self._usable(), "PRAGMA data_version")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if isinstance(error, sqlite3.Error) and is_busy(error):  # without a WAL, by any commit
                    with self._reading() as connection:
                        (version,) = retry_busy(lambda: one_row(connection, "PRAGMA data_version"))
                else:
                    raise outbox_error(self._path, error) from error
        # data_version tells changes on one connection only: another one may begin with the same number.
        return int(version) + (self._openings << 32)


def _fetch(connection: sqlite3.Connection, query: str, values: Sequence[object]) -> list[Any]:
    return connection.execute(query, values).fetchall()
