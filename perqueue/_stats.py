"""What ``stats()`` shows of an outbox and its drain."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


class DrainState(StrEnum):
    """What the drain is doing, as far as this process can know."""

    IDLE = "idle"
    """Nothing is pending."""
    DELIVERING = "delivering"
    """Requests are being sent."""
    BACKING_OFF = "backing_off"
    """Per or the network is away, or asked to wait; ``reason`` says which, ``resumes_at`` until when."""
    PAUSED = "paused"
    """Nothing gets through for a reason that waiting will not mend (a bad token, say); one probe a minute."""
    STANDBY = "standby"
    """Another process drains this outbox, and this one takes over when that ends."""
    OFF = "off"
    """This queue only records (``drain=False``), or has not started to drain."""


class Gate(StrEnum):
    """Why the gate is closed. The values are stored in the outbox."""

    BACKING_OFF = "backing_off"
    """Failures without an answer: an outage."""
    RETRY_AFTER = "retry_after"
    """Per asked for a wait; nothing overrides it."""
    BAD_TOKEN = "bad_token"  # noqa: S105 - a reason, no secret
    """Per refused the token."""
    REFUSED = "refused"
    """Per refused everything, for one reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot of an outbox and its drain; every field costs the same however large the outbox is."""

    pending: int
    """Recorded activities that Per has neither accepted nor refused."""
    oldest_pending_age: float | None
    """Seconds since the oldest pending activity was recorded; None when nothing is pending."""
    delivered: int
    """Activities that Per has accepted, since the outbox was created."""
    rejected: int
    """Activities that Per refused and nobody has requeued or discarded."""
    damaged: int = 0
    """Rows whose checksum no longer fits; they are kept, and never sent."""
    in_flight: int = 0
    """Requests that this process is waiting for."""
    in_flight_limit: int = 0
    """How many it would have in flight now at most: ``max_in_flight``, less where that does not help."""
    rate_limit: float | None = None
    """Requests a second that Per seems to take; None: it has not asked for fewer."""
    state: DrainState = DrainState.OFF
    """What the drain is doing."""
    reason: str | None = None
    """Why it backs off, is paused, or cannot store outcomes."""
    resumes_at: datetime | None = None
    """When it will try again, if that is known (UTC)."""
