"""Handing out what is pending, to any number of drainers: each row to one of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.postgres.connection import SCAN_PATIENCE
from perqueue._outbox.postgres.counts import ALIVE, as_activity
from perqueue._outbox.postgres.floor import FlooredSession
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from perqueue._activity import Activity

_LEAST_SWEEP = 1.0
_SWEEP_SHARE = 20
"""A look at all that is pending is repeated after so many times the time it took, a second at least."""

_FREE = f"(owner IS NULL OR owner <> ALL(ARRAY(SELECT owner FROM perqueue_drainer WHERE {ALIVE})))"
_CLAIM = (
    "UPDATE perqueue_pending p SET owner = %s FROM"
    " (SELECT id FROM perqueue_pending WHERE {} AND {} ORDER BY {} LIMIT %s FOR UPDATE SKIP LOCKED) free"
    " WHERE p.id = free.id"
    " RETURNING p.id, billing_id, user_id, activity_type_id, recorded_at, attempts, reason"
)
_CLAIM_FRESH = _CLAIM.format("not_before IS NULL AND id > %s", _FREE, "id")
_CLAIM_DUE = _CLAIM.format(
    # A wait that ends too late cannot be right: the database's clock was set back.
    "not_before IS NOT NULL AND (not_before <= clock_timestamp()"
    " OR not_before > clock_timestamp() + %s * interval '1 millisecond')",
    _FREE,
    "not_before, id",
)
_CLAIM_WAITING = _CLAIM.format("not_before IS NOT NULL AND id > %s", _FREE, "id")
_CLAIM_NEWEST = _CLAIM.format("true", f"(owner = %s OR {_FREE})", "id DESC")
# Any of the oldest: if it is the activity that is bad, and not the connection, the next try is another one.
_CLAIM_ANY = _CLAIM.format(
    "id = (SELECT id FROM (SELECT id FROM perqueue_pending WHERE (not_before IS NULL"
    f" OR not_before <= clock_timestamp()) AND {_FREE} ORDER BY id LIMIT %s) few ORDER BY random() LIMIT 1)",
    _FREE,
    "id",
).replace("LIMIT %s FOR UPDATE", "FOR UPDATE")
_FEW = 200
_NEXT_DUE = (
    "SELECT (extract(epoch FROM not_before - clock_timestamp()) * 1000)::bigint FROM perqueue_pending"
    f" WHERE not_before IS NOT NULL AND {_FREE} ORDER BY not_before LIMIT 1"
)


class ClaimedSession(FlooredSession):
    """An outbox in a database from which activities are claimed."""

    shared = True
    claim_batch = 100
    """Fewest to claim at a time: a round trip costs as much as delivering several."""
    _sweep_at = float("-inf")

    def claim(self, after: int, limit: int) -> list[Activity]:
        """Return free pending activities, oldest first; mostly above an ID, but now and then all of them.

        Below it are those that were committed late, and those of drainers that have died.
        """
        began = time.monotonic()
        sweeps = began >= self._sweep_at
        if not sweeps:
            return self._claim(_CLAIM_FRESH, (max(after, self._pending_after),), limit)
        try:
            self._find_floor(after)
            return self._claim(_CLAIM_FRESH, (self._pending_after,), limit)
        finally:
            took = time.monotonic() - began
            self._sweep_at = began + max(_LEAST_SWEEP, _SWEEP_SHARE * took)

    def claim_due(self, now: int, farthest: int, limit: int, outstanding: Collection[int]) -> list[Activity]:  # noqa: ARG002 - what is claimed is not claimed again
        """Return pending activities whose own wait is over by the database's clock, or cannot be right."""
        return self._claim(_CLAIM_DUE, (farthest - now,), limit)

    def claim_waiting(self, after: int, limit: int) -> list[Activity]:
        """Return pending activities above an ID that wait on their own account, whatever their time."""
        return self._claim(_CLAIM_WAITING, (after,), limit)

    def claim_newest(self) -> list[Activity]:
        """Return the pending activity that was recorded last, if it is free or this drainer's own."""
        return self._claim(_CLAIM_NEWEST, (self._owner,), 1)

    def _claim(self, query: str, values: Sequence[object], limit: int) -> list[Activity]:
        if self._owner is None or not self.holds_lease():
            return []
        given = (self._owner, *values, limit)
        if self._makes_way():  # one to try with when it is time, and all others are the others'
            if self._claimed or time.monotonic() < self._refrain_until:
                return []
            query, given = _CLAIM_ANY, (self._owner, _FEW)
        try:
            rows = self._rows(query, given, patience=SCAN_PATIENCE)
        except OutboxError:
            self.lose_lease()
            raise
        if rows:
            self.stay_awake()
        self._claimed.update(row[0] for row in rows)
        return [as_activity(row) for row in sorted(rows)]

    def next_due(self) -> int | None:
        """Return the earliest end of an activity's own wait, by this process's clock."""
        rows = self._rows(_NEXT_DUE)
        return SYSTEM_CLOCK.time_ms() + rows[0][0] if rows else None
