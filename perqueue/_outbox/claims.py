"""Handing out what is pending, past whatever the file has lost.

A row whose checksum does not fit, or that cannot be read although it must be there, is settled as damaged:
it is counted, never sent, and kept for ``perqueue doctor``. The others are handed out.
"""

from __future__ import annotations

import functools
import sqlite3
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from perqueue._activity import TRANSITIONS, Activity, Event, State, checksum
from perqueue._outbox.connection import retry_busy
from perqueue._outbox.counts import CountedSession
from perqueue._outbox.damage import corrupt, is_corrupt, is_sound, one_row, settlement_checksum
from perqueue._outbox.queries import (
    CLAIM,
    CLAIM_DUE,
    CLAIM_WAITING,
    LAST_ID,
    ONE,
    OUTCOMES,
    SETTLE,
    UNSETTLED,
    WAITING,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

_MOST_UNREADABLE = 10_000
"""Rows that may be written off as unreadable: beyond, the file as a whole is beyond use."""


class ClaimedSession(CountedSession):
    """An outbox file from which activities are claimed."""

    _unreadable = 0

    def claim(self, after: int, limit: int) -> list[Activity]:
        """Return fresh pending activities above an ID, oldest first; damaged rows are settled as such."""
        return self._claim_past_damage(CLAIM, UNSETTLED, after, limit)

    def claim_waiting(self, after: int, limit: int) -> list[Activity]:
        """Return pending activities above an ID that wait on their own account, whatever their time."""
        return self._claim_past_damage(CLAIM_WAITING, WAITING, after, limit)

    def _claim_past_damage(self, query: str, keys: str, after: int, limit: int) -> list[Activity]:
        while True:  # past any number of damaged rows
            rows, unreadable = self._read(query, keys, (after, limit))
            ids = [after, *(row[0] for row in rows)]
            if any(low >= high for low, high in pairwise(ids)):
                rows, unreadable = self._read_each(keys, (after, limit))
            mended = query is CLAIM and self._drop_unsound(after, rows)
            claimed = self._intact(rows, unreadable)
            if not mended and (claimed or not (rows or unreadable)):
                return claimed

    def _drop_unsound(self, after: int, rows: list[Any]) -> bool:
        """Drop what only seems to be the outcome of one that was passed over; tell whether there was any."""
        with self._reading() as connection:
            end = rows[-1][0] if rows else retry_busy(lambda: one_row(connection, LAST_ID))[0]
            if end - after <= len(rows):
                return False
            try:
                read = functools.partial(connection.execute, OUTCOMES, (after, end, _MOST_UNREADABLE))
                outcomes = retry_busy(lambda: read().fetchall())
            except sqlite3.DatabaseError as error:
                if not is_corrupt(error):
                    raise
                return False
        unsound = [(row[0],) for row in outcomes if not is_sound(row)]
        if unsound:
            return self._drop(unsound)
        return False

    def _drop(self, unsound: list[tuple[int]]) -> bool:
        """Delete outcomes; tell whether any was found: in a damaged table a scan sees what a seek misses."""
        with self._writing() as connection:
            query = "DELETE FROM perqueue_settlement WHERE activity_id = ?"
            dropped = connection.executemany(query, unsound).rowcount
            left = dropped
            # By the counters, too, they are pending again: only the sum of these has to be right.
            counters = ("accepted", "rejected", "discarded", "damaged")
            counts = one_row(connection, f"SELECT {', '.join(counters)} FROM perqueue_drain")
            for counter, count in zip(counters, counts, strict=True):
                taken = min(left, count)
                connection.execute(f"UPDATE perqueue_drain SET {counter} = {counter} - ?", (taken,))
                left -= taken
        self._marks = None  # they have gone back, for once
        return dropped > 0

    def claim_due(self, now: int, farthest: int, limit: int, outstanding: Collection[int]) -> list[Activity]:
        """Return pending activities whose own wait ended by ``now``, less the outstanding ones.

        A wait that ends after ``farthest`` cannot be right (the clock was set back), and has ended too.
        """
        room = limit + len(outstanding)
        rows: list[Any] = []
        unreadable: list[int] = []
        for (query, keys), bound in zip(CLAIM_DUE, (now, farthest), strict=True):
            some, lost = self._read(query, keys, (bound, room))
            rows += [row for row in some if row[0] not in outstanding]
            unreadable += lost
        return self._intact(rows[:limit], unreadable)

    def next_due(self) -> int | None:
        """Return the earliest end of an activity's own wait."""
        query = "SELECT min(not_before) FROM perqueue_retry"
        with self._reading() as connection:
            (earliest,) = retry_busy(lambda: one_row(connection, query))
        return 0 if isinstance(earliest, str | bytes) else earliest

    def _read(self, query: str, keys: str, values: Sequence[object]) -> tuple[list[Any], list[int]]:
        """Return rows, and IDs of those that cannot be read although they are pending."""
        with self._reading() as connection:
            try:
                rows = retry_busy(lambda: connection.execute(query, values).fetchall())
            except sqlite3.DatabaseError as error:
                if not is_corrupt(error):
                    raise
            else:
                if rows and rows[-1][0] > self._last_id:
                    self._notice(connection)  # so that what is claimed is known from now on
                return rows, []
        return self._read_each(keys, values)

    def _read_each(self, keys: str, values: Sequence[object]) -> tuple[list[Any], list[int]]:
        """Read one row at a time: a range ends at the first page that is damaged."""
        rows: list[Any] = []
        unreadable: list[int] = []
        with self._reading() as connection:
            pending = retry_busy(lambda: connection.execute(keys, values).fetchall())
            for activity_id, attempts, reason in pending:
                row = self._read_one(connection, activity_id)
                if row is None:
                    unreadable.append(activity_id)
                else:
                    rows.append((*row, attempts, reason))
            self._unreadable += len(unreadable)
            if self._unreadable > _MOST_UNREADABLE:
                raise corrupt(f"more than {_MOST_UNREADABLE} activities cannot be read")
        return rows, unreadable

    @staticmethod
    def _read_one(connection: sqlite3.Connection, activity_id: int) -> Any:
        read = functools.partial(connection.execute, ONE, (activity_id,))
        try:
            return retry_busy(lambda: read().fetchone())
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            return None

    def _intact(self, rows: list[Any], unreadable: Iterable[int]) -> list[Activity]:
        """Turn pending rows into activities, and quarantine those that are not what was recorded."""
        intact, damaged = self._sorted_out(rows)
        lost = [
            (activity_id, at, "the stored row does not match its checksum") for activity_id, at in damaged
        ]
        lost += [(activity_id, 0, "the stored row cannot be read") for activity_id in unreadable]
        if lost:
            self._quarantine(lost)
        return intact

    def _quarantine(self, lost: list[tuple[int, int, str]]) -> None:
        state = TRANSITIONS[State.PENDING, Event.DAMAGE]
        with self._writing() as connection:
            settled = 0
            for activity_id, at, reason in lost:
                check = settlement_checksum(activity_id, state, at, None, reason)
                values = (activity_id, state, at, 0, activity_id, None, reason, None, check)
                settled += connection.execute(SETTLE, values).rowcount
                connection.execute("DELETE FROM perqueue_retry WHERE activity_id = ?", (activity_id,))
            connection.execute("UPDATE perqueue_drain SET damaged = damaged + ?", (settled,))

    @staticmethod
    def _sorted_out(rows: Iterable[tuple[Any, ...]]) -> tuple[list[Activity], list[tuple[int, int]]]:
        """Return the activities whose checksum fits, and ID and time of the others."""
        intact, damaged = [], []
        for activity_id, billing_id, user_id, kind, recorded_at, check, attempts, reason in rows:
            texts = (billing_id, user_id, kind)
            if not isinstance(recorded_at, int):
                damaged.append((activity_id, 0))
            elif not all(isinstance(text, str) for text in texts) or check != checksum(*texts, recorded_at):
                damaged.append((activity_id, recorded_at))
            else:
                intact.append(
                    Activity(
                        id=activity_id,
                        billing_id=billing_id,
                        user_id=user_id,
                        activity_type_id=kind,
                        recorded_at=recorded_at,
                        # No checksum covers these two: what they cannot be is put right.
                        attempts=attempts if isinstance(attempts, int) and 0 <= attempts < 2**31 else 1,
                        reason=reason if isinstance(reason, str) else None,
                    )
                )
        return intact, damaged
