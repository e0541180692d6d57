"""Deleting what was settled long ago, in steps too small to be felt by ``record()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perqueue._activity import State
from perqueue._outbox.damage import is_corrupt, is_sound, one_row
from perqueue._outbox.session import Session
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    import sqlite3

_RECENT_SKIPPED = 2000
"""Settled activities in a row, too young to be pruned, after which a sweep goes elsewhere, then ends."""
_KEPT = (
    "SELECT coalesce(accepted + discarded - pruned, 0), (SELECT max(id) FROM perqueue_activity)"
    " FROM perqueue_drain"
)
_SETTLED = (
    "SELECT activity_id, state, settled_at, transaction_id, reason, checksum FROM perqueue_settlement"
    " WHERE activity_id > ? ORDER BY activity_id LIMIT ?"
)
_PRUNED = "UPDATE perqueue_drain SET pruned = pruned + ?, trail_lost_through = max(trail_lost_through, ?)"
_DELETE = tuple(
    f"DELETE FROM perqueue_{table} WHERE {key} = ?"
    for table, key in (("attempt", "activity_id"), ("settlement", "activity_id"), ("activity", "id"))
)


class PrunedSession(Session):
    """An outbox file whose settled rows are deleted after a time."""

    _pruned_through = 0
    _explored_through = 0
    _exploring = False
    _recent = 0

    def prune(self, before: int, keep: int, limit: int) -> bool:
        """Look at ``limit`` settled activities and delete those settled before a time or beyond ``keep``.

        Returns whether there may be more to delete; otherwise the next call begins anew. Rejected and
        pending ones stay, and so does the highest ID, that none is ever given twice.
        """
        try:
            with self._writing() as connection:
                rows, old, recent = self._choose(connection, before, keep, limit)
                for statement in _DELETE if old else ():
                    connection.executemany(statement, old)
                if old:
                    gone = set(old)
                    latest = max(row[2] for row in rows if (row[0],) in gone)
                    connection.execute(_PRUNED, (len(old), latest))
        except OutboxError as error:
            if not is_corrupt(error.__cause__):
                raise
            self._pruned_through = 0  # what lies beyond the damage stays: delivery must not wait for this
            return False
        self._recent = 0 if old else self._recent + len(rows) * recent
        return self._go_on(rows[-1][0] if len(rows) == limit else None)

    def _choose(
        self, connection: sqlite3.Connection, before: int, keep: int, limit: int
    ) -> tuple[list[Any], list[tuple[int]], bool]:
        """Return the rows that were looked at, the IDs of those to delete, and if some are too young."""
        kept, highest = one_row(connection, _KEPT)
        rows = connection.execute(_SETTLED, (self._pruned_through, limit)).fetchall()
        old: list[tuple[int]] = []
        recent = False
        for row in rows:
            activity_id, state, settled_at = row[:3]
            if state not in (State.ACCEPTED, State.DISCARDED) or activity_id == highest:
                continue
            if not is_sound(row):
                continue  # it may be a refusal
            if settled_at < before or len(old) < kept - keep:
                old.append((activity_id,))
            else:
                recent = True
        return rows, old, recent

    def _go_on(self, looked_through: int | None) -> bool:
        """Decide where to look next; ``looked_through`` is None at the end of the table.

        The oldest come first. But some of the first may have been delivered late, and say nothing about
        those behind them: each sweep also goes on for a while where the one before it ended.
        """
        if looked_through is not None and self._recent < _RECENT_SKIPPED:
            self._pruned_through = looked_through
            return True
        self._recent = 0
        if looked_through is None:
            self._explored_through = 0
        elif not self._exploring:
            self._exploring = True
            self._pruned_through = max(looked_through, self._explored_through)
            return True
        else:
            self._explored_through = looked_through
        self._exploring = False
        self._pruned_through = 0
        return False
