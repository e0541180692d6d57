"""Everything that perqueue raises.

::

    PerQueueError
    ├── ConfigurationError (also ValueError)   an option, a token's form, a URL, a date
    ├── InvalidActivity (also ValueError)      an ID that Per could not be sent
    ├── OutboxError                            the local storage
    │   ├── OutboxFull                         ``max_pending`` is reached
    │   └── OutboxMismatch (also ConfigurationError)  the file cannot be this queue's outbox
    ├── FlushTimeout (also TimeoutError)       not everything was accepted in time
    ├── ActivityRejected                       Per refused an activity
    ├── PerAPIError                            Per, or the way to it, failed
    │   └── AuthenticationError                Per refused the token
    └── QueueClosed                            the queue was closed before

No exception of httpx, sqlite3 or tenacity passes the public door. No text of these holds a token, a
billing ID or a user ID, so all of them may be logged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perqueue._activity import Activity


class PerQueueError(Exception):
    """Base of every exception that perqueue raises."""


class ConfigurationError(PerQueueError, ValueError):
    """An option, a token's form, a URL or a date cannot be used as given."""


class InvalidActivity(PerQueueError, ValueError):
    """An activity that cannot be sent as it is; nothing was stored.

    Each ID must be a non-empty ``str`` of at most 400 UTF-8 bytes, without NUL and lone surrogates.
    """


class OutboxError(PerQueueError):
    """The outbox could not be read or written.

    Raised by ``record()``, it means that the activity was possibly not stored; recording it again
    changes no bill of the period, because Per counts unique users.
    """

    activity: Activity | None = None
    """The activity that was being recorded, so that a handler can keep it elsewhere."""


class OutboxFull(OutboxError):
    """The outbox holds ``max_pending`` undelivered activities; nothing was stored."""


class OutboxMismatch(OutboxError, ConfigurationError):
    """The file cannot be this queue's outbox: not an outbox, of another origin, or of a newer schema."""


class FlushTimeout(PerQueueError, TimeoutError):
    """Not everything was accepted by Per within the timeout; what is missing is kept and delivered later."""

    def __init__(self, message: str, *, pending: int = 0, reason: str | None = None) -> None:
        super().__init__(message)
        self.pending = pending
        """How many of the awaited activities are not settled yet."""
        self.reason = reason
        """Why, as far as the drain knows; None if it is simply busy."""


class ActivityRejected(PerQueueError):
    """Per refused one or more activities; they are kept in the outbox with Per's reason."""

    def __init__(
        self, message: str, *, reason: str | None = None, activities: Sequence[Activity] = ()
    ) -> None:
        super().__init__(message)
        self.reason = reason
        """Per's reason for (the first of) them."""
        self.activities = tuple(activities)
        """The refused activities, at most 100 of them."""


class PerAPIError(PerQueueError):
    """Per answered with an error, with something that is not Per's, or not at all."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer; None when there was none."""
        self.code = code
        """Per's own reason (the answer's ``message`` or ``error``); None when it gave none."""
        self.retry_after = retry_after
        """Seconds that Per asks to wait (``Retry-After``, with HTTP 429 or 503); None: it does not ask."""


class AuthenticationError(PerAPIError):
    """Per refused the token: it is unknown, or lacks the scope."""


class QueueClosed(PerQueueError):
    """The queue was closed."""
