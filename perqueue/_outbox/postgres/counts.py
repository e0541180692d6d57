"""Saying how an outbox in a database stands, in one statement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString

from perqueue._activity import Activity, State
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.postgres.connection import SCAN_PATIENCE
from perqueue._outbox.postgres.session import Session
from perqueue._outbox.protocol import Hold, Load, News, Position, Settled

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MOST_COUNTED = 10_000
"""Pending activities that are counted one by one, in a millisecond or two; more are estimated."""

ALIVE: LiteralString = "alive_until BETWEEN clock_timestamp() AND clock_timestamp() + interval '20 seconds'"
"""What holds for a drainer that is alive.

One that is alive for longer than any lease was so by a clock that has been set back, or was another server's.
"""
_ALIVE = f"FROM perqueue_drainer WHERE {ALIVE}"
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
    "(SELECT greatest(s.n_live_tup, c.reltuples, 0)::bigint FROM pg_class c"
    " LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid WHERE c.oid = to_regclass({name}))"
)
_PENDING = "'perqueue_pending'"
ROOM = (
    f"SELECT CASE WHEN most <= {MOST_COUNTED} OR estimate >= most"
    f" THEN (SELECT count(*) FROM {{few}} AS few) END, estimate"
    f" FROM (SELECT {_ESTIMATE.format(name='?::text')} AS estimate, ?::bigint AS most) AS e"
)
"""How many are pending, for :func:`as_counted`, given the table's name and how many may be.

They are counted only where that matters: what vacuum may not remove, because somebody's transaction stays
open, is passed over one by one, and ``record()`` cannot wait for that.
"""
OLDEST_FEW = _OLDEST.format(where="", limit=MOST_COUNTED + 1)
_POSITION = (
    "SELECT o.accepted + (SELECT coalesce(sum(accepted), 0) FROM perqueue_drainer)::bigint, o.rejected,"
    " o.discarded, o.damaged, o.rejections, o.refusal_streak, o.refusal_reason, o.probe_requests,"
    " (SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM perqueue_pending_id_seq),"
    f" (SELECT count(*) FROM {OLDEST_FEW} AS few),"
    f" {_ESTIMATE.format(name=_PENDING)},"
    f" (SELECT pid {_ALIVE} ORDER BY since LIMIT 1), p.id, p.recorded_at, l.*, {_HOLD}"
    " FROM perqueue_outbox o"
    f" LEFT JOIN (SELECT * FROM {_OLDEST.format(where='', limit=1)} few ORDER BY id LIMIT 1) p ON true,"
    " (SELECT coalesce(sum(in_flight), 0)::int, coalesce(sum(in_flight_limit), 0)::int, sum(rate_limit)"
    f" {_ALIVE}) l"
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


def as_counted(row: Sequence[int | None]) -> int:
    """Return how many are pending: exactly up to :data:`MOST_COUNTED`, if counted, else as estimated."""
    counted, estimate = row
    if counted is None or counted > MOST_COUNTED:
        return max(counted or 0, estimate or 0)
    return counted


def as_activity(row: Sequence[Any]) -> Activity:
    """Return an activity from its columns: what was recorded, how often it was tried, why it waits."""
    number, billing_id, user_id, kind, recorded_at, attempts, reason = row
    return Activity(
        id=number,
        billing_id=billing_id,
        user_id=user_id,
        activity_type_id=kind,
        recorded_at=recorded_at,
        attempts=attempts,
        reason=reason,
    )


class CountedSession(Session):
    """An outbox in a database that knows how much is in it."""

    _looked = False

    def position(self) -> Position:
        """Return how it stands; ``pending`` is exact up to :data:`MOST_COUNTED`."""
        in_haste = self._looked and not self._is_drain_thread()
        patience = self._patience if in_haste else max(self._patience, SCAN_PATIENCE)
        self._looked = True
        (
            accepted, rejected, discarded, damaged, rejections, streak, refusal, probe_requests, last_id,
            counted, estimate, drainer_pid, oldest, recorded_at, in_flight, limit, rate, *hold,
        ) = self._row(_POSITION, patience=patience)  # fmt: skip
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
            load=Load(in_flight, limit, rate),
            counted=as_counted((counted, estimate)),
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
        rows = self._rows(_REJECTED_SINCE, (rejection, min(limit, 2**62)))
        return [as_activity(row) for row in rows]

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


NOW_MS: LiteralString = "(extract(epoch FROM statement_timestamp()) * 1000)::bigint"
"""The time by the database's clock, which is the only one that all hosts share."""


def age_ms(moment: int) -> int:
    """Return for how long a time has been over by this host's clock: so long ago it is by any other's."""
    return SYSTEM_CLOCK.time_ms() - moment
