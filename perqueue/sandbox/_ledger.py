"""What was received: activities in order of acceptance, requests, and counts."""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from urllib.parse import parse_qsl

LOGGED_REQUESTS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedActivity:
    """One accepted activity; a repeat of it is another one."""

    billing_id: str
    user_id: str
    activity_type_id: str
    transaction_id: str
    """Unique for ever, also over `reset()`."""
    received_at: datetime
    """Aware, UTC: Per dates an activity by its arrival."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSeen:
    """One HTTP request that reached an endpoint of the API."""

    at: datetime
    """When it arrived; aware, UTC."""
    method: str
    path: str
    """For example `/activities.add`."""
    query: str
    """The query string as it was sent, still encoded."""
    headers: Mapping[str, str] = field(repr=False)
    """Looked up without regard to case. Not in the repr: they hold a token."""
    fault: str | None
    """Name of the fault that it met, if any."""
    accepted: bool
    """Whether it added an activity."""

    @property
    def parameters(self) -> dict[str, str]:
        """The decoded query; of a repeated parameter the last value."""
        return dict(parse_qsl(self.query, keep_blank_values=True))


class Ledger:
    """Everything that a sandbox remembers; safe to use from any thread."""

    def __init__(self) -> None:
        """Start with nothing received."""
        self.renew_lock()
        self.busy = 0
        self.forget()

    def renew_lock(self) -> None:
        """Replace the lock: a forked child may have inherited it locked."""
        self._changed = threading.Condition()

    def forget(self) -> None:
        """Forget all activities and requests."""
        with self._changed:
            self._activities: list[ReceivedActivity] = []
            self._log: deque[RequestSeen] = deque(maxlen=LOGGED_REQUESTS)
            self._requests = 0
            self._most_busy = self.busy

    def enter(self) -> None:
        """Count a request in."""
        with self._changed:
            self.busy += 1
            self._most_busy = max(self._most_busy, self.busy)

    def leave(self) -> None:
        """Count a request out: it is answered, or its client is gone."""
        with self._changed:
            self.busy -= 1

    def log(self, request: RequestSeen, activity: ReceivedActivity | None) -> None:
        """Write down a request, and the activity that it added."""
        with self._changed:
            self._requests += 1
            self._log.append(request)
            if activity is not None:
                self._activities.append(activity)
            self._changed.notify_all()

    @property
    def accepted(self) -> int:
        """How many activities were accepted, repeats included."""
        return len(self._activities)

    @property
    def requests(self) -> int:
        """How many requests arrived."""
        return self._requests

    @property
    def max_concurrent(self) -> int:
        """The highest number of requests being handled at once."""
        return self._most_busy

    def activities(self) -> tuple[ReceivedActivity, ...]:
        """Return all activities, in order of acceptance."""
        with self._changed:
            return tuple(self._activities)

    def request_log(self) -> tuple[RequestSeen, ...]:
        """Return the latest requests, oldest first."""
        with self._changed:
            return tuple(self._log)

    def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait for something to be true of this ledger; `False` when time is up."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def users(self, start: datetime | None, end: datetime | None) -> dict[str, dict[str, set[str]]]:
        """Return activity type -> billing ID -> users that arrived from `start` to `end`."""
        found: dict[str, dict[str, set[str]]] = {}
        for activity in self.activities():
            if start is not None and activity.received_at < start:
                continue
            if end is not None and activity.received_at > end:
                continue
            groups = found.setdefault(activity.activity_type_id, {})
            groups.setdefault(activity.billing_id, set()).add(activity.user_id)
        return found
