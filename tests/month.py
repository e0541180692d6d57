"""A past month, in an outbox and in a sandbox at once: what was recorded then, and what Per has of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from perqueue._activity import Event, Settlement
from perqueue._outbox import OperatorOutbox
from perqueue.sandbox import ReceivedActivity, RequestSeen

if TYPE_CHECKING:
    from pathlib import Path

    from perqueue.sandbox import Sandbox

START = datetime(2026, 3, 1, tzinfo=UTC)
END = datetime(2026, 3, 31, 23, 59, 59, 999000, tzinfo=UTC)
PERIOD = ("--start", "2026-03-01", "--end", "2026-03-31")
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def ms(moment):
    return round(moment.timestamp() * 1000)


class Month:
    """Writes activities of March 2026 into an outbox, and what Per accepts of them into a sandbox."""

    def __init__(self, path: Path, per: Sandbox) -> None:
        self.path, self._per = path, per
        self._outbox = OperatorOutbox(path, per.url)

    def close(self):
        self._outbox.close()

    def at_per(self, billing_id, user_id, at, kind="LOGIN", transaction_id="T"):
        """Have Per know of an activity, from wherever."""
        activity = ReceivedActivity(
            billing_id=billing_id,
            user_id=user_id,
            activity_type_id=kind,
            transaction_id=transaction_id,
            received_at=at,
        )
        request = RequestSeen(
            at=at, method="GET", path="/activities.add", query="", headers={}, fault=None, accepted=True
        )
        self._per._ledger.log(request, activity)

    def recorded(self, billing_id, user_id, at, kind="LOGIN"):
        """Record an activity that stays pending, and return it."""
        number = self._outbox.append(billing_id, user_id, kind, ms(at))
        return self._outbox.claim(number - 1, 1)[0]

    def delivered(self, billing_id, user_id, at, arrived=None, kind="LOGIN"):
        """Record an activity that Per accepts, at once or later."""
        activity = self.recorded(billing_id, user_id, at, kind)
        arrived = arrived or at
        self.at_per(billing_id, user_id, arrived, kind, f"T{activity.id}")
        self._settle(activity, Event.ACCEPT, arrived, transaction_id=f"T{activity.id}")

    def rejected(self, billing_id, user_id, at, reason="invalid_user_id", kind="LOGIN"):
        """Record an activity that Per refuses."""
        self._settle(self.recorded(billing_id, user_id, at, kind), Event.REJECT, at, reason=reason)

    def _settle(self, activity, event, at, **more):
        settlement = Settlement(activity=activity, event=event, answered_at=ms(at), duration_ms=0, **more)
        self._outbox.settle([settlement], drained_through=0, refusals=(0, None))
