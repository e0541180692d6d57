"""What can be seen of an outbox, and of who drains it, from outside."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox import Onlooker, Position
    from perqueue._outbox.look import Look

_NAMED = 3
"""Drainers that are named; of more, only the number is told."""
_NO_ROOM = 2**20
"""Bytes of free space below which nothing can be expected to grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """All that can be seen of an outbox from outside, at one moment."""

    path: Path | DatabaseURL
    now: int
    """Milliseconds since the epoch."""
    drained: bool | None
    """Whether some process holds the drain lock; None if this user may not know."""
    look: Look | None
    """None if the file could not be read."""
    error: str | None = None
    """Why not."""
    room: int | None = None
    """Bytes that are free on its file system; None if that is not told."""

    @property
    def is_full(self) -> bool:
        """Whether the file can be taken to be unable to grow."""
        return self.room is not None and self.room < _NO_ROOM

    @property
    def oldest_age(self) -> float | None:
        """Return for how many seconds the oldest has been pending; None if none is."""
        oldest = self.look.position.oldest_pending if self.look else None
        return None if oldest is None else max(0, self.now - oldest[1]) / 1000

    @property
    def drainer(self) -> str:
        """Return who drains, for the middle of a sentence."""
        drainers = self.look.drainers if self.look else None
        if drainers:
            named = ", ".join(f"process {pid} on {host}" for host, pid in drainers[:_NAMED])
            return f"{named} and {len(drainers) - _NAMED} more" if len(drainers) > _NAMED else named
        pid = self.look.position.drainer_pid if self.look else None
        return f"process {pid}" if pid else "a process that is starting or ending"


def see(onlooker: Onlooker, path: Path | DatabaseURL) -> Sight:
    """Look once; what is wrong with the file is part of what is seen."""
    from perqueue._clock import SYSTEM_CLOCK

    look, error = None, None
    try:
        look = onlooker.look()
    except OutboxError as problem:
        error = str(problem)
    return Sight(
        path=path,
        now=SYSTEM_CLOCK.time_ms(),
        drained=_is_drained(path, look),
        look=look,
        error=error,
        room=_room(path) if isinstance(path, Path) else None,
    )


def _is_drained(path: Path | DatabaseURL, look: Look | None) -> bool | None:
    if isinstance(path, Path):
        from perqueue._lock import is_drained

        return is_drained(path)
    return None if look is None else bool(look.drainers)


def _room(path: Path) -> int | None:
    try:
        system = os.statvfs(path)
    except OSError:
        return None
    return system.f_bavail * system.f_frsize


def fields(sight: Sight) -> dict[str, Any]:
    """Return what ``--json`` shows of an outbox that was seen; raise if it could not be read."""
    look = sight.look
    if look is None:
        raise OutboxError(sight.error)
    from perqueue._status import crossing

    return snapshot(look.position, drained=sight.drained) | {
        "discarded": look.position.discarded,
        "origin": look.origin,
        "month_end": crossing(look.position.pending, sight.now),
    }


def snapshot(position: Position, *, drained: bool | None) -> dict[str, Any]:
    """Return the fields of :class:`perqueue.Stats` as another process can know them, and who drains."""
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._outbox import Load
    from perqueue._status import describe

    stats = asdict(describe(position, None, drains=drained is not False, now=SYSTEM_CLOCK.time_ms()))
    load = position.load if drained is not False else Load()  # who was killed cannot take it back
    stats |= {"in_flight": load.in_flight, "in_flight_limit": load.limit, "rate_limit": load.rate}
    return stats | {"drained": drained, "drainer_pid": position.drainer_pid if drained else None}
