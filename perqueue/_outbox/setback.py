"""Noticing a file that goes back to an earlier state while it is open, so that its numbers are given again.

A backup is restored into it, or somebody deletes rows. SQLite lets every connection go on as if nothing had
happened. But nothing that this process remembers by a number (claims, receipts, windows) is true any more.
"""

from __future__ import annotations

import logging
import sqlite3
from operator import lt
from typing import TYPE_CHECKING

from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import is_corrupt
from perqueue._outbox.session import Session

if TYPE_CHECKING:
    from typing import Any

log = logging.getLogger("perqueue")

# What only ever grows, then the outbox's own ID, the newest activity, and the one that was the newest.
_MARKS = (
    "SELECT accepted, rejections, discarded, damaged, pruned, holds, probe_requests, drained_through,"
    " (SELECT outbox_id FROM perqueue_outbox), n.id,"
    " n.billing_id, n.user_id, n.activity_type_id, n.recorded_at, n.checksum,"
    " l.billing_id, l.user_id, l.activity_type_id, l.recorded_at, l.checksum"
    " FROM perqueue_drain LEFT JOIN perqueue_activity l ON l.id = ?"
    " LEFT JOIN perqueue_activity n ON n.id = (SELECT max(id) FROM perqueue_activity)"
)
_GROWING = 8
_COLUMNS = 5
_PRUNED = 4
# A number is free if nothing speaks of it, nor of a later one that is not there.
_IS_TAKEN = (
    "SELECT (SELECT drained_through FROM perqueue_drain) >= :id"
    " OR EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id >= :id AND NOT EXISTS"
    " (SELECT 1 FROM perqueue_activity a WHERE a.id = s.activity_id AND a.id > :id))"
    " OR EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id >= :id AND NOT EXISTS"
    " (SELECT 1 FROM perqueue_activity a WHERE a.id = r.activity_id AND a.id > :id))"
)


class SetBackSession(Session):
    """An outbox file that knows when what was read from it before is no longer its own past."""

    epoch = 0
    """How often the file was found to have gone back to an earlier state."""
    _last_id = 0
    """The highest number that this process knows of."""
    _last: tuple[Any, ...] = (None,) * _COLUMNS
    """What is stored of it."""
    _marks: tuple[int, ...] | None = None

    def _notice(self, connection: sqlite3.Connection) -> None:
        """Look whether the file has gone back since the last look. Called under the lock."""
        last_id, last = self._last_id, self._last  # a signal handler may record meanwhile
        try:
            row = retry_busy(lambda: connection.execute(_MARKS, (last_id,)).fetchone())
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            return  # damage is another matter, for others to tell
        if row is None:
            return
        marks: tuple[Any, ...] = row[:_GROWING]
        outbox_id, newest = row[_GROWING : _GROWING + 2]
        newest_is, last_is = row[-2 * _COLUMNS : -_COLUMNS], row[-_COLUMNS:]
        if outbox_id is not None and outbox_id != self._outbox_id:
            self._replaced()
        known, self._marks = self._marks, marks
        if known is None:
            self._last_id, self._last = newest or 0, newest_is
        elif (
            (newest or 0) < last_id
            or (marks != known and any(map(lt, marks, known)))
            or (not _is_same(last_is, last) and (last_is[-1] is not None or marks[_PRUNED] == known[_PRUNED]))
        ):
            self._last_id, self._last = newest or 0, newest_is
            self._went_back()
        elif newest is not None and newest > self._last_id:
            self._last_id, self._last = newest, newest_is

    def _went_back(self) -> None:
        """Forget what was known of the file by numbers."""
        self.epoch += 1
        log.error(
            "outbox %s has gone back to an earlier state while it was open (a backup restored into it, or"
            " rows deleted): what it holds now is delivered, what is gone from it is not",
            self._path,
        )

    def _is_taken(self, connection: sqlite3.Connection, activity_id: int) -> bool:
        """Tell whether the file speaks of the activity that is given this number as of another."""
        (taken,) = retry_busy(lambda: connection.execute(_IS_TAKEN, {"id": activity_id}).fetchone())
        return taken is None or bool(taken)


def _is_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tell whether two rows are of one activity: an operator may have corrected its type."""
    return one[4] == other[4] or (*one[:2], one[3]) == (*other[:2], other[3])
