"""Deleting what was settled long ago, in steps too small to be felt by ``record()``."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from perqueue._activity import State
from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import is_corrupt, is_sound, one_row
from perqueue._outbox.setback import SetBackSession
from perqueue._outbox.sweep import Sweep
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from pathlib import Path

_KEPT = (
    "SELECT coalesce(accepted + discarded - pruned, 0),"
    " (SELECT coalesce(max(id), 0) FROM perqueue_activity) FROM perqueue_drain"
)
_SETTLED = (
    "SELECT activity_id, state, settled_at, transaction_id, reason, checksum FROM perqueue_settlement"
    " WHERE activity_id > ? ORDER BY activity_id LIMIT ?"
)
# Ranges: row by row takes several times as long, and record() waits meanwhile.
_DELETE = "DELETE FROM perqueue_{} WHERE {} BETWEEN ? AND ?"
_PRUNED = "UPDATE perqueue_drain SET pruned = pruned + ?, trail_lost_through = max(trail_lost_through, ?)"


class PrunedSession(SetBackSession):
    """An outbox file whose settled rows are deleted after a time."""

    def __init__(self, path: Path, origin: str | None, *, create: bool, embedded: bool | None = None) -> None:
        self._sweep = Sweep()
        super().__init__(path, origin, create=create, embedded=embedded)

    def prune(self, before: int, keep: int, limit: int) -> bool:
        """Look at ``limit`` settled activities and delete those settled before a time or beyond ``keep``.

        Returns whether there may be more to delete; otherwise the next call begins anew. Rejected and
        pending ones stay, and so does the highest ID, that none is ever given twice.
        """
        try:
            rows, kept, highest = self._look(limit)
            # Outside the lock: what is accepted or discarded never changes again.
            old, recent, latest = _choose(rows, before, kept - keep, highest)
            if old:
                self._delete(old, latest)
        except OutboxError as error:
            if not is_corrupt(error.__cause__):
                raise
            self._sweep.begin_anew()  # what lies beyond the damage stays: delivery must not wait for this
            return False
        through = rows[-1][0] if len(rows) == limit else None
        return self._sweep.looked(len(rows), through=through, found=bool(old), recent=recent)

    def _look(self, limit: int) -> tuple[list[Any], int, int]:
        """Return the next settled rows, how many there are in all, and the highest ID."""
        with self._reading() as connection:
            kept, highest = retry_busy(lambda: one_row(connection, _KEPT))
            values = (self._sweep.through, limit)
            return retry_busy(lambda: connection.execute(_SETTLED, values).fetchall()), kept, highest

    def _delete(self, old: list[int], latest: int) -> None:
        with self._writing(commits=len(old)) as connection:
            runs = _runs(old)
            connection.executemany(_DELETE.format("attempt", "activity_id"), runs)
            connection.executemany(_DELETE.format("activity", "id"), runs)
            pruned = connection.executemany(_DELETE.format("settlement", "activity_id"), runs).rowcount
            connection.execute(_PRUNED, (pruned, latest))


def _choose(rows: list[Any], before: int, surplus: int, highest: int) -> tuple[list[int], bool, int]:
    """Return the IDs of the rows to delete, whether some are too young, and the latest outcome that goes."""
    old: list[int] = []
    recent = False
    latest = 0
    for row in rows:
        activity_id, state, settled_at = row[:3]
        # Above: recorded since the look at what was highest.
        if state not in (State.ACCEPTED, State.DISCARDED) or activity_id >= highest:
            continue
        if not is_sound(row):
            continue  # it may be a refusal
        if settled_at < before or len(old) < surplus:
            old.append(activity_id)
            latest = max(latest, settled_at)
        else:
            recent = True
    return old, recent, latest


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return first and last of each run of consecutive numbers: between them may be pending ones."""
    ends = [n for n, (low, high) in enumerate(pairwise(numbers)) if high != low + 1]
    firsts = [numbers[0], *(numbers[n + 1] for n in ends)]
    return list(zip(firsts, [*(numbers[n] for n in ends), numbers[-1]], strict=True))
