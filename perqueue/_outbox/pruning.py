"""Deleting what was settled long ago, in steps too small to be felt by ``record()``."""

from __future__ import annotations

from perqueue._activity import State
from perqueue._outbox.session import Session

_RECENT_SKIPPED = 2000
"""Settled activities in a row, too young to be pruned, after which pruning ends."""


class PrunedSession(Session):
    """An outbox file whose settled rows are deleted after a time."""

    _pruned_through = 0
    _recent = 0

    def prune(self, before: int, keep: int, limit: int) -> bool:
        """Look at ``limit`` settled activities and delete those settled before a time or beyond ``keep``.

        Returns whether there may be more to delete; otherwise the next call begins anew. Rejected and
        pending ones stay, and so does the highest ID, that none is ever given twice.
        """
        with self._writing() as connection:
            kept, highest = connection.execute(
                "SELECT accepted + discarded - pruned, (SELECT max(id) FROM perqueue_activity)"
                " FROM perqueue_drain"
            ).fetchone()
            rows = connection.execute(
                "SELECT activity_id, state, settled_at FROM perqueue_settlement WHERE activity_id > ?"
                " ORDER BY activity_id LIMIT ?",
                (self._pruned_through, limit),
            ).fetchall()
            excess = kept - keep
            old: list[tuple[int]] = []
            recent = False
            for activity_id, state, settled_at in rows:
                if state not in (State.ACCEPTED, State.DISCARDED) or activity_id == highest:
                    continue
                if settled_at < before or len(old) < excess:
                    old.append((activity_id,))
                else:
                    recent = True
            if old:
                keys = (("attempt", "activity_id"), ("settlement", "activity_id"), ("activity", "id"))
                for table, key in keys:
                    connection.executemany(f"DELETE FROM perqueue_{table} WHERE {key} = ?", old)
                connection.execute("UPDATE perqueue_drain SET pruned = pruned + ?", (len(old),))
        # Some of the first may have been delivered late, and say nothing about those behind them.
        self._recent = 0 if old else self._recent + len(rows) * recent
        more = len(rows) == limit and self._recent < _RECENT_SKIPPED
        if not more:
            self._recent = 0
        self._pruned_through = rows[-1][0] if more else 0
        return more
