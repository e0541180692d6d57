"""The audit trail as programs see it: :meth:`perqueue.PerQueue.history`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from perqueue._clock import moment_from_ms, ms_from_datetime
from perqueue._outbox import Filter, open_trail
from perqueue._report import checked_moment
from perqueue.exceptions import ConfigurationError

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue._outbox import Traced, Try

HISTORY_LIMIT = 10_000

StateName = Literal["pending", "accepted", "rejected", "discarded", "damaged"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivityRecord:
    """One activity in the audit trail, and what became of it. Times are aware, in UTC."""

    id: int
    """Its number in the outbox: grows, and is never used again."""
    billing_id: str
    user_id: str
    activity_type_id: str
    state: StateName
    """``pending``, ``accepted``, ``rejected``, ``discarded`` (rejected, and given up by an operator), or
    ``damaged``: what is stored is not what was recorded, or not Per's answer."""
    recorded_at: datetime
    """When ``record()`` was called."""
    settled_at: datetime | None
    """When Per's answer arrived; None while it is pending."""
    attempts: int
    """How many requests were made for it."""
    transaction_id: str | None
    """Per's; None unless it is accepted."""
    reason: str | None
    """Why it is not accepted: Per's reason, or the last failure's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One request for one activity."""

    attempted_at: datetime
    """When it was sent: aware, in UTC."""
    duration_ms: int
    """Milliseconds until its answer, or until it was given up."""
    reason: str | None
    """Why it brought no acceptance; None if it did."""


def attempts(place: Path | DatabaseURL, activity_id: int) -> list[Attempt]:
    """See :meth:`perqueue.PerQueue.attempts`."""
    if not _is_count(activity_id):
        message = "activity_id must be a whole number"
        raise ConfigurationError(message)
    with open_trail(place) as trail:
        found = trail.trace_one(activity_id)
    return [as_attempt(each) for each in found[1]] if found is not None else []


def as_attempt(each: Try) -> Attempt:
    """Return what is shown of a request."""
    return Attempt(
        attempted_at=moment_from_ms(each.attempted_at), duration_ms=each.duration_ms, reason=each.reason
    )


def history(
    place: Path | DatabaseURL,
    *,
    billing_id: str | None = None,
    user_id: str | None = None,
    activity_type_id: str | None = None,
    since: datetime | str | None = None,
    until: datetime | str | None = None,
    after: int = 0,
    limit: int | None = HISTORY_LIMIT,
) -> list[ActivityRecord]:
    """See :meth:`perqueue.PerQueue.history`."""
    ids = {"billing_id": billing_id, "user_id": user_id, "activity_type_id": activity_type_id}
    for name, value in ids.items():
        if value is not None and not isinstance(value, str):
            message = f"{name} must be a str, not {type(value).__name__}"
            raise ConfigurationError(message)
        if value is not None and not _is_unicode(value):
            message = f"{name} has a lone surrogate: no activity has such an ID"
            raise ConfigurationError(message)
    if not _is_count(after) or not (limit is None or (_is_count(limit) and limit)):
        message = "after must be a whole number from 0, limit one from 1 or None"
        raise ConfigurationError(message)
    wanted = Filter(billing_id, user_id, activity_type_id, _ms("since", since), _ms("until", until))
    with open_trail(place) as trail:
        return [as_record(one) for one in trail.trace(wanted, after, limit or 2**62)]


def as_record(one: Traced) -> ActivityRecord:
    """Return what is shown of an activity."""
    return ActivityRecord(
        id=one.id,
        billing_id=one.billing_id,
        user_id=one.user_id,
        activity_type_id=one.activity_type_id,
        state=cast("StateName", one.state.name.lower()),
        recorded_at=moment_from_ms(one.recorded_at),
        settled_at=None if one.settled_at is None else moment_from_ms(one.settled_at),
        attempts=one.attempts,
        transaction_id=one.transaction_id,
        reason=one.reason,
    )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _ms(name: str, value: datetime | str | None) -> int | None:
    """Return a time in the outbox's unit, rounded so that no activity of that millisecond is left out."""
    moment = checked_moment(name, value)
    if moment is None:
        return None
    return ms_from_datetime(moment) + (name == "until" and moment.microsecond % 1000 > 0)
