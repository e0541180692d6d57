"""Writing outcomes down: many in one statement, and only those of activities that are still one's own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from perqueue._activity import TRANSITIONS, State
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.postgres import leases
from perqueue._outbox.postgres.claims import ClaimedSession
from perqueue._outbox.postgres.counts import NOW_MS
from perqueue._outbox.postgres.leases import boot_time, host_name
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from perqueue._activity import Settlement
    from perqueue._outbox.postgres.connection import Connection
    from perqueue._outbox.protocol import Hold

# By how much a host's clock is wrong. A statement may take a second to arrive: less than two is nothing.
_SHIFT_MS = f"CASE WHEN abs({NOW_MS} - %(now)s) < 2000 THEN 0 ELSE {NOW_MS} - %(now)s END"

LATE = "no answer written down before the lease was over, but Per accepted it as"
"""Why an acceptance is none: the activity is another drainer's by now, and sent again. Per may count both."""

# One statement, so one round trip and one transaction. The row of perqueue_outbox is written only when
# something was refused: its lock gives refusals numbers in the order in which they are committed.
_SETTLE = f"""
WITH answer AS (
    SELECT id, state, at + {_SHIFT_MS} AS settled_at, duration_ms, transaction_id, reason, wait_ms
    FROM unnest(
        %(ids)s::bigint[], %(states)s::smallint[], %(times)s::bigint[], %(durations)s::int[],
        %(transactions)s::text[], %(reasons)s::text[], %(waits)s::bigint[]
    ) AS a(id, state, at, duration_ms, transaction_id, reason, wait_ms)
), moved AS (
    DELETE FROM perqueue_pending p USING answer a
    WHERE p.id = a.id AND a.state <> 0 AND p.owner = %(owner)s
    RETURNING p.id, p.billing_id, p.user_id, p.activity_type_id, p.recorded_at, p.tries,
        a.state, a.settled_at, a.duration_ms, a.transaction_id, a.reason
), deferred AS (
    UPDATE perqueue_pending p SET
        tries = p.tries + a.times,
        owner = CASE WHEN a.wait_ms IS NULL THEN p.owner END,
        attempts = p.attempts + (a.wait_ms IS NOT NULL)::int,
        not_before = CASE WHEN a.wait_ms IS NULL THEN p.not_before
            ELSE clock_timestamp() + a.wait_ms * interval '1 millisecond' END,
        reason = a.reason
    FROM (
        SELECT id, count(*) AS times, max(wait_ms) AS wait_ms, max(reason) AS reason FROM answer
        GROUP BY id HAVING max(state) = 0
    ) a
    WHERE p.id = a.id AND p.owner = %(owner)s
    RETURNING p.id
), logged AS (
    INSERT INTO perqueue_attempt (activity_id, attempted_at, duration_ms, reason)
    SELECT id, settled_at - duration_ms, duration_ms, reason FROM answer WHERE state = 0
    UNION ALL
    SELECT id, settled_at - duration_ms, duration_ms, '{LATE} ' || transaction_id FROM answer a
    WHERE state = 1 AND id NOT IN (SELECT id FROM moved) AND transaction_id IS DISTINCT FROM
        (SELECT s.transaction_id FROM perqueue_settled s WHERE s.id = a.id)
), counted AS (
    INSERT INTO perqueue_drainer (owner, host, pid, alive_until, answered_at, accepted)
    SELECT %(owner)s, %(host)s, %(pid)s, clock_timestamp() + %(lease)s * interval '1 second',
        CASE WHEN count(*) > 0 THEN clock_timestamp() END, count(*) FROM moved WHERE state = 1
    ON CONFLICT (owner) DO UPDATE SET
        alive_until = excluded.alive_until,
        answered_at = coalesce(excluded.answered_at, perqueue_drainer.answered_at),
        asleep = false,
        accepted = perqueue_drainer.accepted + excluded.accepted
), refused AS (
    SELECT count(*) AS many FROM moved WHERE state = 2
), told AS (
    UPDATE perqueue_outbox o SET
        rejected = o.rejected + many,
        rejections = o.rejections + many,
        refusal_streak = %(streak)s,
        refusal_reason = %(streak_reason)s
    FROM refused
    WHERE many > 0 OR o.refusal_streak <> %(streak)s
        OR o.refusal_reason IS DISTINCT FROM %(streak_reason)s
    RETURNING o.rejections - many AS before
), stored AS (
    INSERT INTO perqueue_settled (
        id, billing_id, user_id, activity_type_id, recorded_at,
        state, settled_at, duration_ms, tries, transaction_id, reason, rejection
    )
    SELECT id, billing_id, user_id, activity_type_id, recorded_at,
        state, settled_at, duration_ms,
        tries + (SELECT count(*) FROM answer a WHERE a.id = moved.id), transaction_id, reason,
        CASE WHEN state = 2
            THEN (SELECT before FROM told) + row_number() OVER (PARTITION BY state ORDER BY settled_at, id)
        END
    FROM moved
)
SELECT id FROM moved UNION ALL SELECT id FROM deferred
"""

REQUEUE = """
WITH moved AS (
    DELETE FROM perqueue_settled WHERE id = ANY(%(ids)s::bigint[]) AND state = 2 RETURNING *
), logged AS (
    INSERT INTO perqueue_attempt (activity_id, attempted_at, duration_ms, reason)
    SELECT id, settled_at - duration_ms, duration_ms, reason FROM moved
), stored AS (
    INSERT INTO perqueue_pending (
        id, billing_id, user_id, activity_type_id, recorded_at, attempts, tries, not_before, reason
    )
    SELECT id, billing_id, user_id, coalesce(%(kind)s, activity_type_id), recorded_at, %(attempts)s, tries,
        clock_timestamp(), reason
    FROM moved
), counted AS (
    UPDATE perqueue_outbox SET rejected = rejected - (SELECT count(*) FROM moved)
    WHERE EXISTS (SELECT FROM moved)
)
SELECT id FROM moved
"""


class SettledSession(ClaimedSession):
    """An outbox in a database to which a drainer writes what came of its requests."""

    settle_batch = 100
    settle_delay = 0.1
    follow_interval = 0.2
    epoch = 0
    lost: Collection[int] = ()
    """Activities of the latest :meth:`settle` that have become another drainer's: nothing was written."""

    def settle(
        self,
        settlements: Sequence[Settlement],
        *,
        drained_through: int,  # noqa: ARG002 - there is no watermark: numbers are not committed in order
        refusals: tuple[int, str | None],
        take_back: tuple[Sequence[int], Hold] | None = None,
        epoch: int = 0,  # noqa: ARG002 - whatever happens to the tables, no row of theirs has this owner then
    ) -> Hold | None:
        """Write outcomes and the streak of refusals in one transaction; see the protocol."""
        if self._owner is None:
            message = "nothing can be settled outside a drainer's term"
            raise OutboxError(message)
        values = _values(settlements) | {
            "owner": self._owner,
            "host": host_name(),
            "pid": os.getpid(),
            "lease": leases.LEASE,
            "streak": refusals[0],
            "streak_reason": refusals[1],
        }
        began, held = boot_time(), self.holds_lease()
        if take_back is None:
            written = self._rows(_SETTLE, values)
        else:
            with self._transaction() as connection:
                written = connection.execute(_SETTLE, values).fetchall()
                self._take_back(connection, take_back[0])
        mine = {row[0] for row in written}
        if any(s.event == "accept" for s in settlements):
            self._failures = 0
        self.lost = [s.activity.id for s in settlements if s.activity.id not in mine]
        gone = {s.activity.id for s in settlements if s.event != "defer" or s.not_before is not None}
        self._claimed -= gone
        self._claimed.difference_update(self.lost)
        if held:
            self._lease_until = max(self._lease_until, began + leases.LEASE * (1 - leases.MARGIN))
        return None if take_back is None else self.set_hold(take_back[1])

    @staticmethod
    def _take_back(connection: Connection, activity_ids: Sequence[int]) -> None:
        values = {"ids": list(activity_ids), "kind": None, "attempts": 1}
        connection.execute(REQUEUE, values)
        connection.execute("UPDATE perqueue_outbox SET refusal_streak = 0, refusal_reason = NULL")


def _values(settlements: Sequence[Settlement]) -> dict[str, Any]:
    states = [TRANSITIONS[State.PENDING, s.event] for s in settlements]
    return {
        "ids": [s.activity.id for s in settlements],
        "states": [int(state) for state in states],
        "times": [s.answered_at for s in settlements],
        "now": SYSTEM_CLOCK.time_ms(),
        "durations": [s.duration_ms for s in settlements],
        "transactions": [_storable(s.transaction_id) for s in settlements],
        "reasons": [
            (_storable(s.reason) or "no reason") if state is not State.ACCEPTED else None
            for s, state in zip(settlements, states, strict=True)
        ],
        "waits": [
            None if s.not_before is None else max(0, s.not_before - s.answered_at) for s in settlements
        ],
    }


def _storable(text: str | None) -> str | None:
    """Return a text as PostgreSQL can hold it: NUL it cannot."""
    return None if text is None else text.replace("\0", "�")
