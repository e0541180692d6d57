"""What only an operator asks of an outbox: to list, requeue or give up what Per refused."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from perqueue._activity import TRANSITIONS, Event, State, checksum
from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import is_sound, one_row, settlement_checksum
from perqueue._outbox.queries import ONE, REFUSAL
from perqueue._outbox.sqlite import SQLiteOutbox

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator, Sequence


_BATCH = 50
"""Activities to a transaction: more would hold up ``record()``."""


class OperatorOutbox(SQLiteOutbox):
    """An outbox in the hands of an operator: the command line opens it so."""

    def requeue(self, activity_ids: Sequence[int] | None, activity_type_id: str | None = None) -> int:
        """Make rejected activities (None: all) pending again, with a corrected type if one is given."""
        count = 0
        for some in self._rejected_in_batches(activity_ids):
            with self._writing(commits=len(some)) as connection:
                # Of some, a damaged file may hold nothing but the refusal: there is nothing to send.
                whole = [i for i in some if self._read_one(connection, i) is not None]
                moved = self._requeue(connection, whole, attempts=0)
                if activity_type_id is not None:
                    self._retype(connection, moved, activity_type_id)
                count += len(moved)
        self.request_probe()
        return count

    @staticmethod
    def _retype(connection: sqlite3.Connection, activity_ids: Iterable[int], kind: str) -> None:
        for activity_id in activity_ids:
            row = connection.execute(ONE, (activity_id,)).fetchone()
            if row is None or row[5] != checksum(*row[1:5]):
                continue  # a new checksum would pass a damaged row off as sound
            billing_id, user_id, _, recorded_at = row[1:5]
            connection.execute(
                "UPDATE perqueue_activity SET activity_type_id = ?, checksum = ? WHERE id = ?",
                (kind, checksum(billing_id, user_id, kind, recorded_at), activity_id),
            )

    def discard(self, activity_ids: Sequence[int] | None) -> int:
        """Give up rejected activities (None: all of them); they stay in the audit trail as discarded."""
        count = 0
        state = TRANSITIONS[State.REJECTED, Event.DISCARD]
        for some in self._rejected_in_batches(activity_ids):
            with self._writing(commits=len(some)) as connection:
                moved = 0
                for activity_id in some:
                    row = connection.execute(REFUSAL, (activity_id,)).fetchone()
                    if row is None or row[1] != State.REJECTED or not is_sound(row[:6]):
                        continue
                    settled_at, transaction_id, reason = row[2:5]
                    check = settlement_checksum(activity_id, state, settled_at, transaction_id, reason)
                    values = (state, check, activity_id)
                    moved += connection.execute(
                        "UPDATE perqueue_settlement SET state = ?, rejection = NULL, checksum = ?"
                        " WHERE activity_id = ?",
                        values,
                    ).rowcount
                connection.execute(
                    "UPDATE perqueue_drain SET rejected = rejected - ?, discarded = discarded + ?",
                    (moved, moved),
                )
                count += moved
        return count

    def _rejected_in_batches(self, activity_ids: Sequence[int] | None) -> Iterator[list[int]]:
        """Yield IDs of rejected activities in batches that do not hold up ``record()`` for long."""
        if activity_ids is None:
            yield from self._all_rejected()
            return
        for start in range(0, len(activity_ids), _BATCH):
            yield self._still_rejected(activity_ids[start : start + _BATCH])

    def _all_rejected(self) -> Iterator[list[int]]:
        # Up to the latest refusal there is now: what is requeued may be refused again meanwhile.
        with self._reading() as connection:
            latest = "SELECT coalesce(max(rejection), 0) FROM perqueue_settlement"
            (last,) = retry_busy(lambda: one_row(connection, latest))
        after = 0
        query = (
            "SELECT activity_id, rejection FROM perqueue_settlement"
            " WHERE rejection > ? AND rejection <= ? ORDER BY rejection LIMIT ?"
        )
        while True:
            with self._reading() as connection:
                page = functools.partial(connection.execute, query, (after, last, _BATCH))
                rows = retry_busy(page).fetchall()
            if not rows or rows[-1][1] <= after:  # in a damaged file they may go backwards
                return
            after = rows[-1][1]
            yield self._still_rejected([activity_id for activity_id, _ in rows])

    def _still_rejected(self, activity_ids: Sequence[int]) -> list[int]:
        known = self.settled(activity_ids)
        return [i for i in activity_ids if i in known and known[i].state is State.REJECTED]
