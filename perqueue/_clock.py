"""The two clocks, injectable: the wall dates things, the monotonic one measures waits."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Clock:
    """Where time comes from. Tests replace the two functions."""

    __slots__ = ("monotonic", "wall")

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.wall = wall
        """Seconds since the epoch; may jump."""
        self.monotonic = monotonic
        """Seconds from an arbitrary start; never jumps, and every deadline counts in it."""

    def time_ms(self) -> int:
        """Return the wall clock in whole milliseconds since the epoch, the unit of the outbox."""
        return int(self.wall() * 1000)


SYSTEM_CLOCK = Clock()
LAST_MOMENT = 253_402_300_799_000
"""The end of the year 9999, which datetime can still show, in milliseconds since the epoch."""
_EPOCH = datetime.fromtimestamp(0, UTC)


def datetime_from_ms(milliseconds: int) -> datetime:
    """Turn the outbox's unit into an aware UTC datetime."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def moment_from_ms(milliseconds: int) -> datetime:
    """Turn what is stored into an aware UTC datetime, whatever it is."""
    # A damaged one may be any number: it is shown as the nearest time that there is.
    return datetime_from_ms(min(max(milliseconds, 0), LAST_MOMENT))


def ms_from_datetime(moment: datetime) -> int:
    """Turn an aware datetime into the outbox's unit, without what is finer."""
    return (moment - _EPOCH) // timedelta(milliseconds=1)
