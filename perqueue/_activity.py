"""One activity: its parts, the states it can be in, and the answers that move it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NamedTuple
from zlib import crc32

from perqueue.exceptions import InvalidActivity

MAX_ID_BYTES = 400
"""Longest ID, in UTF-8 bytes. Per states no limit; this keeps the longest request under 4 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """One recorded activity, as the outbox holds it."""

    id: int
    """Its number in the outbox: grows, and is never used again."""
    billing_id: str
    """Groups users into whoever gets the bill (Per's documentation, "Concepts")."""
    user_id: str
    """The user, unique within the billing ID."""
    activity_type_id: str
    """What kind of activity is counted, from Per's activity types page."""
    recorded_at: int
    """When ``record()`` was called: milliseconds since the epoch, by the wall clock."""
    attempts: int = 0
    """How often it failed on its own account, while others got through."""
    reason: str | None = None
    """Why it is not accepted: the last failure's reason, or Per's."""


class State(IntEnum):
    """Where an activity stands. The numbers are stored."""

    PENDING = 0
    """Recorded, and not answered by Per yet."""
    ACCEPTED = 1
    """Per has it, and gave a transaction ID."""
    REJECTED = 2
    """Per refused it; kept with the reason until an operator decides."""
    DISCARDED = 3
    """Rejected, and given up by an operator."""
    DAMAGED = 4
    """Its row on disk is not what was recorded; never sent."""


class Event(StrEnum):
    """What can happen to an activity."""

    ACCEPT = "accept"
    REJECT = "reject"
    DEFER = "defer"
    DAMAGE = "damage"
    REQUEUE = "requeue"
    DISCARD = "discard"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.PENDING, Event.ACCEPT): State.ACCEPTED,
    (State.PENDING, Event.REJECT): State.REJECTED,
    (State.PENDING, Event.DEFER): State.PENDING,
    (State.PENDING, Event.DAMAGE): State.DAMAGED,
    (State.REJECTED, Event.REQUEUE): State.PENDING,
    (State.REJECTED, Event.DISCARD): State.DISCARDED,
}
"""Every legal move. Accepted, discarded and damaged activities never move again."""


class Verdict(StrEnum):
    """What an answer to one request means (the table in :mod:`perqueue._answers`)."""

    ACCEPTED = "accepted"
    REJECTED = "rejected"
    NO_ANSWER = "no answer"
    """Nothing that Per said about the activity: it stays pending."""
    RATE_LIMITED = "rate limited"
    """Per, or something before it, asks for fewer requests: it stays pending."""
    BAD_TOKEN = "bad token"  # noqa: S105 - a verdict, no secret
    """The token is at fault, not the activity: it stays pending."""


class Outcome(NamedTuple):
    """What came of one request."""

    verdict: Verdict
    transaction_id: str | None = None
    """Per's transaction ID; set exactly when accepted."""
    reason: str | None = None
    """Why not accepted, fit to be stored: no token, at most 500 characters."""
    retry_after: float | None = None
    """Seconds to wait before anything else is sent, if the answer asked for it."""
    status: int | None = None
    """HTTP status of the answer; None if there was none."""


class Settlement(NamedTuple):
    """What the worker asks the outbox to write about one activity."""

    activity: Activity
    event: Event
    answered_at: int
    """When the answer arrived, in milliseconds since the epoch."""
    duration_ms: int = 0
    """From sending the request to its answer."""
    transaction_id: str | None = None
    reason: str | None = None
    not_before: int | None = None
    """For a deferral on the activity's own account: no new attempt before this time (ms since the epoch)."""


def checked_id(name: str, value: object) -> str:
    """Return the ID as a plain ``str``; raise :class:`InvalidActivity` if Per could not be sent it.

    The text of the exception names the parameter and the rule, never the value.
    """
    if not isinstance(value, str):
        message = f"{name} must be a str, not {type(value).__name__}"
        raise InvalidActivity(message)
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        message = f"{name} has a lone surrogate, which UTF-8 cannot carry"
        raise InvalidActivity(message) from None
    if not size:
        message = f"{name} must not be empty"
        raise InvalidActivity(message)
    if size > MAX_ID_BYTES:
        message = f"{name} is {size} UTF-8 bytes long; at most {MAX_ID_BYTES} are allowed"
        raise InvalidActivity(message)
    if "\0" in value:
        message = f"{name} must not contain NUL"
        raise InvalidActivity(message)
    # A str subclass (an enumeration's member, say) may format differently from what it is.
    return value if type(value) is str else str.__str__(value)


def checksum(billing_id: str, user_id: str, activity_type_id: str, recorded_at: int) -> int:
    """Return the CRC-32 that is stored beside an activity, so that a damaged row is never sent.

    The parts are joined with NUL, which no ID contains.
    """
    text = f"{recorded_at}\0{billing_id}\0{user_id}\0{activity_type_id}"
    return crc32(text.encode("utf-8", "surrogateescape"))
