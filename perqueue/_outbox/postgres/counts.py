"""Saying how an outbox in a database stands, in one statement."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, LiteralString

from perqueue._activity import Activity, State
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.postgres.session import Session
from perqueue._outbox.protocol import Hold, News, Position, Settled

if TYPE_CHECKING:
    from collections.abc import Iterable

MOST_COUNTED = 10_000
"""Pending activities that are counted one by one, in a millisecond or two; more are estimated."""

_ALIVE = "FROM perqueue_drainer WHERE alive_until > clock_timestamp()"
_HOLD = (
    "o.hold, o.hold_reason, o.hold_wait_ms, o.holds,"
    " (extract(epoch FROM o.hold_until - clock_timestamp()) * 1000)::bigint"
)
# The oldest that are pending. What is fresh lies behind much that was deleted, if there is any: see floor.py.
_OLDEST: LiteralString = (
    "((SELECT id, recorded_at FROM perqueue_pending"
    " WHERE id > (SELECT pending_after FROM perqueue_outbox){where} ORDER BY id LIMIT {limit})"
    " UNION ALL (SELECT id, recorded_at FROM perqueue_pending WHERE not_before IS NOT NULL"
    " AND id <= (SELECT pending_after FROM perqueue_outbox){where} ORDER BY id LIMIT {limit}))"
)
# The statistics collector counts what was inserted less what was deleted; after a crash it begins anew.
_ESTIMATE = (
    "greatest((SELECT n_live_tup FROM pg_stat_all_tables WHERE relid = 'perqueue_pending'::regclass),"
    " (SELECT reltuples FROM pg_class WHERE oid = 'perqueue_pending'::regclass))::bigint"
)
_POSITION = (
    "SELECT o.accepted + (SELECT coalesce(sum(accepted), 0) FROM perqueue_drainer)::bigint, o.rejected,"
    " o.discarded, o.damaged, o.rejections, o.refusal_streak, o.refusal_reason, o.probe_requests,"
    " (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM perqueue_pending_id_seq),"
    f" (SELECT count(*) FROM {_OLDEST.format(where='', limit=MOST_COUNTED + 1)} AS few), {_ESTIMATE},"
    f" (SELECT pid {_ALIVE} ORDER BY since LIMIT 1), p.id, p.recorded_at, {_HOLD}"
    " FROM perqueue_outbox o"
    f" LEFT JOIN (SELECT * FROM {_OLDEST.format(where='', limit=1)} few ORDER BY id LIMIT 1) p ON true"
)
_NEWS = f"SELECT o.probe_requests, {_HOLD} FROM perqueue_outbox o"
_SETTLED = (
    "SELECT id, state, transaction_id, reason, settled_at FROM perqueue_settled WHERE id = ANY(%s::bigint[])"
)
_COUNT = (
    "SELECT least(count(*), %(limit)s) FROM "
    + _OLDEST.format(where=" AND id <= %(through)s", limit="%(limit)s")
    + " AS few"
)
_LAST_REASON = "SELECT reason FROM perqueue_attempt WHERE activity_id = %s ORDER BY id DESC LIMIT 1"
_REJECTED_SINCE = (
    "SELECT id, billing_id, user_id, activity_type_id, recorded_at, tries, reason FROM perqueue_settled"
    " WHERE rejection > %s ORDER BY rejection LIMIT %s"
)
_DRAINERS = f"SELECT host, pid {_ALIVE} ORDER BY since"


def as_hold(kind: str | None, reason: str, wait_ms: int, number: int, left_ms: int) -> Hold | None:
    """Return why nothing is sent, with its end by this process's clock: hosts' clocks differ."""
    if kind is None:
        return None
    return Hold(
        kind=kind, reason=reason, until=SYSTEM_CLOCK.time_ms() + left_ms, wait_ms=wait_ms, number=number
    )


class CountedSession(Session):
    """An outbox in a database that knows how much is in it."""

    def position(self) -> Position:
        """Return how it stands; ``pending`` is exact up to :data:`MOST_COUNTED`."""
        (
            accepted, rejected, discarded, damaged, rejections, streak, refusal, probe_requests, last_id,
            counted, estimate, drainer_pid, oldest, recorded_at, *hold,
        ) = self._row(_POSITION)  # fmt: skip
        return Position(
            last_id=last_id,
            drained_through=0,
            accepted=accepted,
            rejected=rejected,
            discarded=discarded,
            damaged=damaged,
            rejections=rejections,
            refusal_streak=streak,
            refusal_reason=refusal,
            hold=as_hold(*hold),
            pauses=hold[3],
            probe_requests=probe_requests,
            drainer_pid=drainer_pid,
            oldest_pending=None if oldest is None else (oldest, recorded_at),
            counted=counted if counted <= MOST_COUNTED else max(counted, estimate),
        )

    def news(self) -> News:
        """Return what other processes may have changed."""
        probe_requests, *hold = self._row(_NEWS)
        return News(probe_requests=probe_requests, hold=as_hold(*hold))

    def settled(self, activity_ids: Iterable[int]) -> dict[int, Settled]:
        """Return the outcomes of those that have one."""
        ids = list(activity_ids)
        rows = self._rows(_SETTLED, (ids,)) if ids else []
        return {
            number: Settled(state=State(state), transaction_id=transaction_id, reason=reason, settled_at=at)
            for number, state, transaction_id, reason, at in rows
        }

    def count_pending(self, through: int, limit: int) -> int:
        """Count the pending activities up to an ID, up to a limit."""
        (count,) = self._row(_COUNT, {"through": through, "limit": limit})
        return int(count)

    def last_reason(self, activity_id: int) -> str | None:
        """Return why the latest attempt to deliver an activity failed; None if none has."""
        rows = self._rows(_LAST_REASON, (activity_id,))
        return str(rows[0][0]) if rows else None

    def rejected_since(self, rejection: int, limit: int) -> list[Activity]:
        """Return activities that are rejected now, by refusals after a number."""
        return [
            Activity(
                id=number,
                billing_id=billing_id,
                user_id=user_id,
                activity_type_id=kind,
                recorded_at=at,
                attempts=attempts,
                reason=reason,
            )
            for number, billing_id, user_id, kind, at, attempts, reason in self._rows(
                _REJECTED_SINCE, (rejection, min(limit, 2**62))
            )
        ]

    def refusals(self) -> int:
        """Return a number that grows when an activity is refused."""
        (count,) = self._row("SELECT rejections FROM perqueue_outbox")
        return int(count)

    def drainers(self) -> list[tuple[str, int]]:
        """Return host and process ID of every drainer that is alive, the longest-serving first."""
        return [(host, pid) for host, pid in self._rows(_DRAINERS)]

    def is_drained(self) -> bool:
        """Tell whether anybody drains now."""
        return bool(self.drainers())


def boot_time() -> float:
    """Return seconds that go on while the machine sleeps: the other hosts' leases run on meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def host_name() -> str:
    """Return what other hosts know this one by."""
    return os.uname().nodename
