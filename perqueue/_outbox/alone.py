"""What a drainer asks of an outbox that it shares with others, where it is the only one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perqueue._lock import drain_lock, is_drained
from perqueue._outbox.protocol import News

if TYPE_CHECKING:
    from pathlib import Path

    from filelock import BaseFileLock

    from perqueue._activity import Activity
    from perqueue._outbox.protocol import Position


class Alone:
    """An outbox with one drainer at a time, elected by a lock: whatever is claimed is its own."""

    shared = False
    claim_batch = 1
    settle_batch = 64
    settle_delay = 0.01
    follow_interval = 0.05

    @property
    def path(self) -> Path:
        """Where the file is."""
        raise NotImplementedError

    def position(self) -> Position:
        """Return counters and watermark."""
        raise NotImplementedError

    def claim(self, after: int, limit: int) -> list[Activity]:
        """Return fresh pending activities above an ID, oldest first."""
        raise NotImplementedError

    def drain_lock(self) -> BaseFileLock:
        """Return what a process must hold to drain."""
        return drain_lock(self.path)

    def is_drained(self) -> bool | None:
        """Tell whether some process drains now; None if this user may not know."""
        return is_drained(self.path)

    def news(self) -> News:
        """Return what other processes may have changed."""
        position = self.position()
        return News(probe_requests=position.probe_requests, hold=position.hold)

    def claim_newest(self) -> list[Activity]:
        """Return the activity that was recorded last, if it is pending and was never tried."""
        return self.claim(self.position().last_id - 1, 1)

    def holds_lease(self) -> bool:
        """Tell whether what was claimed is still this drainer's."""
        return True

    def keep_lease(self) -> float | None:
        """Say that this drainer is alive."""
        return None

    def stay_awake(self) -> None:
        """Look for what others did more often, for a while: a look at the file costs nothing."""

    def take_probe(self) -> bool:
        """Tell whether this drainer, of all of them, may ask whether Per answers again."""
        return True
