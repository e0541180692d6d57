"""Describing an outbox and its drain in the terms of ``stats()``."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from perqueue._clock import datetime_from_ms
from perqueue._stats import DrainState, Gate, Stats

if TYPE_CHECKING:
    from perqueue._delivery.worker import Worker
    from perqueue._outbox import Hold, Position


MONTH_END_NEAR = timedelta(hours=24)
"""How near the end of the month (UTC) must be for what is pending to be about to cross it."""


def crossing(pending: int, now: int) -> datetime | None:
    """Return the end of the month if something pending is about to cross it: Per dates by arrival.

    ``now`` is in milliseconds since the epoch.
    """
    moment = datetime_from_ms(now)
    month = moment.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = (month + timedelta(days=32)).replace(day=1)
    return end if pending > 0 and end - moment <= MONTH_END_NEAR else None


def held(hold: Hold) -> tuple[DrainState, str]:
    """Return the state and the reason of a drain that sends nothing for now."""
    pausing = hold.kind in (Gate.BAD_TOKEN, Gate.REFUSED)
    state = DrainState.PAUSED if pausing else DrainState.BACKING_OFF
    plain = hold.kind == Gate.BACKING_OFF
    return state, hold.reason if plain else f"{hold.kind.replace('_', ' ')}: {hold.reason}"


def describe(position: Position, worker: Worker | None, *, drains: bool, now: int) -> Stats:
    """Return what a process knows: from the outbox, and from its own worker if it has one.

    ``now`` is in milliseconds since the epoch.
    """
    state, reason, resumes_at = DrainState.OFF, None, None
    hold = position.hold
    if worker is not None and worker.trouble:
        state, reason = DrainState.PAUSED, worker.trouble
    elif hold is not None and position.pending > 0:
        state, reason = held(hold)
        resumes_at = datetime_from_ms(hold.until)
    elif worker is not None and worker.standby:
        state = DrainState.STANDBY
        reason = f"process {position.drainer_pid} drains" if position.drainer_pid else None
    elif drains:
        state = DrainState.DELIVERING if position.pending else DrainState.IDLE
    oldest = position.oldest_pending
    return Stats(
        pending=position.pending,
        oldest_pending_age=None if oldest is None else max(0.0, (now - oldest[1]) / 1000),
        delivered=position.accepted,
        rejected=position.rejected,
        damaged=position.damaged,
        in_flight=worker.in_flight if worker is not None else 0,
        in_flight_limit=worker.pace.limit if worker is not None else 0,
        rate_limit=worker.pace.rate if worker is not None else None,
        state=state,
        reason=reason,
        resumes_at=resumes_at,
    )
