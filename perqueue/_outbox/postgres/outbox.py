"""The outbox in a PostgreSQL database."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, LiteralString

from perqueue._outbox.postgres.counts import NOW_MS, OLDEST_FEW, ROOM, age_ms, as_counted
from perqueue._outbox.postgres.joining import FOREVER, JoinedSession
from perqueue._outbox.postgres.leases import WAKE
from perqueue._outbox.sweep import Sweep

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox.protocol import Key

_NOTIFY_INTERVAL = 0.05
"""Seconds between two notifications of one process: each takes a lock that all that notify share."""
_PRUNED_AT_A_TIME = 500

_APPEND: LiteralString = (
    "INSERT INTO perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
    " VALUES (%s, %s, %s, %s) RETURNING id"
)
_WAKE: LiteralString = f", {WAKE.format(drainer='perqueue_drainer').replace('?', '%s')}"
_ONCE: LiteralString = "SELECT perqueue_record_once(%s, %s, %s, %s, %s, %s)"
_ROOM = ROOM.format(few=OLDEST_FEW).replace("?", "%s")
_STANDING = (
    "SELECT c.activity_id FROM perqueue_coalesced c"
    " WHERE (window_end, window_start, billing_id, user_id, activity_type_id) = (%s, %s, %s, %s, %s)"
    " AND NOT EXISTS (SELECT FROM perqueue_settled s WHERE s.id = c.activity_id AND s.state <> 1)"
)
_EXPIRE = (
    "DELETE FROM perqueue_coalesced WHERE ctid = ANY(ARRAY("
    f"SELECT ctid FROM perqueue_coalesced WHERE window_end < {NOW_MS} - %s LIMIT %s))"
)
# One drainer of all at a time: the lock ends with the statement.
_PRUNE = f"""
WITH mine AS (
    SELECT accepted + discarded - pruned + (SELECT coalesce(sum(accepted), 0) FROM perqueue_drainer) AS kept
    FROM perqueue_outbox WHERE pg_try_advisory_xact_lock(hashtext(outbox_id), 1)
), looked AS (
    SELECT id, state IN (1, 3) AS may_go, settled_at FROM perqueue_settled
    WHERE id > %(after)s AND EXISTS (SELECT FROM mine) ORDER BY id LIMIT %(limit)s
), old AS (
    SELECT id FROM (
        SELECT id, settled_at, row_number() OVER (ORDER BY id) AS place FROM looked WHERE may_go
    ) l, mine WHERE settled_at < {NOW_MS} - %(age)s OR place <= kept - %(keep)s
), gone AS (
    DELETE FROM perqueue_settled WHERE id = ANY(ARRAY(SELECT id FROM old)) RETURNING id, settled_at
), attempts AS (
    DELETE FROM perqueue_attempt WHERE activity_id IN (SELECT id FROM gone)
), counted AS (
    UPDATE perqueue_outbox SET pruned = pruned + (SELECT count(*) FROM gone),
        trail_lost_through = greatest(trail_lost_through, (SELECT max(settled_at) FROM gone))
    WHERE EXISTS (SELECT FROM gone)
)
SELECT count(*), max(id), (SELECT count(*) FROM gone), count(*) FILTER (WHERE may_go) FROM looked
"""


class PostgresOutbox(JoinedSession):
    """An :class:`~perqueue._outbox.protocol.Outbox` that many processes on many hosts share."""

    def __init__(
        self,
        url: DatabaseURL,
        origin: str | None,
        *,
        create: bool = True,
        embedded: bool = False,  # noqa: ARG002 - in a database it always is
        power: bool = False,  # noqa: ARG002 - a commit is as durable as the server's synchronous_commit says
        max_pending: int = FOREVER,
    ) -> None:
        self._sweep = Sweep()
        self._notified_at = float("-inf")
        super().__init__(url, origin, create=create, max_pending=max_pending)

    def append(self, billing_id: str, user_id: str, activity_type_id: str, recorded_at: int) -> int:
        """Commit one activity and return its ID."""
        return self._record(_APPEND, (billing_id, user_id, activity_type_id, recorded_at))

    def _record(self, query: LiteralString, values: tuple[object, ...]) -> int:
        if self._must_count():
            self._check_room(as_counted(self._row(_ROOM, ("perqueue_pending", self._max_pending))))
        now = time.monotonic()
        # A drain of this process hears of it without the database.
        if self._owner is None and now >= self._notified_at + _NOTIFY_INTERVAL:
            self._notified_at = now
            query, values = query + _WAKE, (*values, self._channel)
        return int(self._rows(query, values, prepare=True)[0][0])

    def append_once(self, key: Key, window: tuple[int, int], recorded_at: int) -> int:
        """Commit one activity, unless an equal one stands for it in a window; return the ID of which does."""
        standing = self._rows(_STANDING, (window[1], window[0], *key), prepare=True)
        if standing:
            return int(standing[0][0])
        return self._record(_ONCE, (*key, recorded_at, *window))

    # -- keeping house, in the drain

    def expire(self, before: int, limit: int) -> bool:
        """Forget windows that ended before a time, up to ``limit`` keys; tell whether there may be more."""
        with self._transaction() as connection:
            return connection.execute(_EXPIRE, (age_ms(before), limit)).rowcount == limit

    def prune(self, before: int, keep: int, limit: int) -> bool:
        """Delete activities settled before a time or beyond ``keep``; tell whether there may be more."""
        limit = max(limit, _PRUNED_AT_A_TIME)
        values = {"age": age_ms(before), "keep": keep, "limit": limit, "after": self._sweep.through}
        at, last, gone, may_go = self._row(_PRUNE, values)
        through = last if at == limit else None
        return self._sweep.looked(at, through=through, found=gone > 0, recent=may_go > gone)

    # -- the drainer's term, in place of a lock

    def drain_lock(self) -> PostgresOutbox:
        """Return what a process must hold to drain: its own registration."""
        return self

    def acquire(self) -> None:
        """Begin a term: any number of drainers may have one."""
        self.begin_term()

    def release(self, force: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - as locks have it
        """End the term."""
        self.end_term()
