"""The side of a sandbox that shows what it received."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime

    from perqueue.sandbox._ledger import Ledger, ReceivedActivity, RequestSeen


class Received:
    """Looks into the ledger, from any thread, also after the sandbox has stopped."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @property
    def activities(self) -> tuple[ReceivedActivity, ...]:
        """All accepted activities in order of acceptance, every repeat too."""
        return self._ledger.activities()

    @property
    def accepted(self) -> int:
        """How many activities were accepted, repeats included; quicker than `len(activities)`."""
        return self._ledger.accepted

    @property
    def requests(self) -> int:
        """How many HTTP requests reached an endpoint of the API, whatever became of them."""
        return self._ledger.requests

    @property
    def request_log(self) -> tuple[RequestSeen, ...]:
        """The latest 10,000 of those requests, oldest first."""
        return self._ledger.request_log()

    @property
    def max_concurrent(self) -> int:
        """The highest number of those requests under way at once; more than 1 only if answers take time."""
        return self._ledger.max_concurrent

    def unique(
        self,
        billing_id: str,
        activity_type_id: str | None = None,
        start: datetime | None = None,
        end: datetime | None = None,
    ) -> int:
        """Count the distinct users of a billing ID that arrived from `start` to `end`, both included.

        Without an activity type, a user counts once over all types. `None` leaves an end of the period open.
        """
        if any(moment is not None and moment.tzinfo is None for moment in (start, end)):
            raise ValueError("start and end must be aware datetimes")
        users = self._ledger.users(start, end)
        types = users if activity_type_id is None else [activity_type_id]
        return len(set().union(*(users.get(each, {}).get(billing_id, ()) for each in types)))

    def wait_for(self, count: int, timeout: float = 10) -> None:
        """Wait until `count` activities in all were accepted; `TimeoutError` after so many seconds."""
        if not self._ledger.wait_until(lambda: self._ledger.accepted >= count, timeout):
            raise TimeoutError(f"{self.accepted} of {count} activities were accepted within {timeout} s")

    def wait_for_requests(self, count: int, timeout: float = 10) -> None:
        """Wait until `count` requests in all have arrived; `TimeoutError` after so many seconds."""
        if not self._ledger.wait_until(lambda: self._ledger.requests >= count, timeout):
            raise TimeoutError(f"{self.requests} of {count} requests arrived within {timeout} s")
