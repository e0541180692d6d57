"""One activity for all of its key in a window, across threads, processes and restarts."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from perqueue._activity import State, checksum
from perqueue._outbox.claims import ClaimedSession
from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import one_row

if TYPE_CHECKING:
    import sqlite3

    from perqueue._outbox.protocol import Key

_STANDING = (
    "SELECT c.activity_id, s.state FROM perqueue_coalesced c"
    " LEFT JOIN perqueue_settlement s ON s.activity_id = c.activity_id"
    " WHERE c.window_end = ? AND c.window_start = ?"
    " AND c.billing_id = ? AND c.user_id = ? AND c.activity_type_id = ?"
    # An operator may have corrected its type: then it stands for none of the old one.
    " AND NOT EXISTS (SELECT 1 FROM perqueue_activity a"
    " WHERE a.id = c.activity_id AND a.activity_type_id <> c.activity_type_id)"
)
_STAND = "INSERT OR REPLACE INTO perqueue_coalesced VALUES (?, ?, ?, ?, ?, ?)"
_KEY = "window_end, window_start, billing_id, user_id, activity_type_id"
_EXPIRE = (
    f"DELETE FROM perqueue_coalesced WHERE ({_KEY}) IN"
    f" (SELECT {_KEY} FROM perqueue_coalesced WHERE window_end < ? ORDER BY {_KEY} LIMIT ?)"
)


class CoalescedSession(ClaimedSession):
    """An outbox file that can tell whether an equal activity was recorded in a window."""

    def _insert(self, connection: sqlite3.Connection, values: tuple[object, ...]) -> int:
        """Store one activity, within a transaction."""
        raise NotImplementedError

    def _sync(self) -> None:
        """Return once what was committed is as safe as ``durability`` asks for."""
        raise NotImplementedError

    def append_once(self, key: Key, window: tuple[int, int], recorded_at: int) -> int:
        """Commit one activity, unless an equal one stands for it in a window; return the ID of which does.

        ``window`` is its beginning and its end, in milliseconds since the epoch. One that Per refused stands
        for no other.
        """
        values = (window[1], window[0], *key)
        with self._reading() as connection:
            if connection.in_transaction:  # what it finds may be rolled back
                self._in_transaction()
            standing = retry_busy(functools.partial(self._standing, connection, values))
        if standing is None:
            standing = self._stand(key, values, recorded_at)
            self._sync()
        return standing

    def _stand(self, key: Key, values: tuple[object, ...], recorded_at: int) -> int:
        with self._begun() as connection:
            with self._committing(connection):
                standing = self._standing(connection, values)  # another process may have been faster
                if standing is None:
                    row = (*key, recorded_at, checksum(*key, recorded_at))
                    activity_id = self._insert(connection, row)
                    connection.execute(_STAND, (*values, activity_id))
            if standing is None:
                self._last_id, self._last = activity_id, row  # not before it is committed
                standing = activity_id
            self._check_identity(recorded_at)
        return standing

    @staticmethod
    def _standing(connection: sqlite3.Connection, values: tuple[object, ...]) -> int | None:
        row = connection.execute(_STANDING, values).fetchone()
        if row is None or row[1] not in (None, State.ACCEPTED):  # no outcome: pending
            return None
        return int(row[0])

    def refusals(self) -> int:
        """Return a number that differs when one was refused, found to be damaged, or taken back."""
        with self._reading() as connection:
            self._notice(connection)
            query = "SELECT rejections + damaged FROM perqueue_drain"
            (count,) = retry_busy(lambda: one_row(connection, query))
        return int(count) + (self.epoch << 48)

    def expire(self, before: int, limit: int) -> bool:
        """Forget windows that ended before a time, up to ``limit`` keys; tell whether there may be more."""
        with self._writing() as connection:
            return connection.execute(_EXPIRE, (before, limit)).rowcount == limit
