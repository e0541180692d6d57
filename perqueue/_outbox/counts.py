"""Saying in O(1) what an outbox holds, and noticing when its own books do not balance."""

from __future__ import annotations

import functools
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from perqueue import _threads
from perqueue._clock import LAST_MOMENT
from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import corrupt, is_corrupt, one_row
from perqueue._outbox.protocol import Hold, Load, Position
from perqueue._outbox.pruning import PrunedSession
from perqueue._outbox.queries import (
    COUNT_FRESH,
    COUNT_WAITING,
    OLDEST_FRESH,
    POSITION,
    POSITION_PAST_DAMAGE,
    RECORDED_AT,
)
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SLICE = 500
"""Activities that are counted at a time: half a millisecond."""
_GAP = 1e-4
"""Seconds between two slices: a lock that is taken again at once is never seen free by who waits for it."""


class Positions:
    """Reads how an outbox stands, and remembers how far it has searched past damage."""

    _searched_through = 0

    def _position(self, connection: sqlite3.Connection) -> Position:
        position = read_position(connection)
        if position.oldest_pending is not None or not position.pending:
            return position
        with _one_snapshot(connection):
            position = read_position(connection)
            if position.oldest_pending is not None or not position.pending:
                return position
            return self._find_the_rest(connection, position)

    def _find_the_rest(self, connection: sqlite3.Connection, position: Position) -> Position:
        """Look for what must be pending by the counters, below the watermark: that may be the damage.

        What is not there either is missing: it was recorded, and its row is gone, or seems settled.
        """
        try:
            row = connection.execute(OLDEST_FRESH, (self._searched_through,)).fetchone()
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            row = None
        if row is None:
            self._searched_through = position.last_id
            missing = position.pending
            return position._replace(damaged=position.damaged + missing, missing=missing)
        (oldest,) = row
        self._searched_through = oldest - 1  # another call need not look at those before it again
        return position._replace(
            drained_through=oldest - 1,
            oldest_pending=(oldest, _recorded_at(connection, oldest)),
        )


class CountedSession(Positions, PrunedSession):
    """An outbox file that knows how much is in it."""

    def position(self) -> Position:
        """Return counters and watermark."""
        with self._reading() as connection:
            while True:
                epoch = self.epoch
                position = retry_busy(lambda: self._position(connection))
                self._notice(connection)
                if self.epoch == epoch:
                    return position

    def _went_back(self) -> None:
        super()._went_back()
        self._searched_through = 0

    def count_pending(self, through: int, limit: int) -> int:
        """Count the pending activities up to an ID, up to a limit."""
        position = self.position()
        try:
            fresh = self._count(COUNT_FRESH, position.drained_through, through, limit)
            return fresh + self._count(COUNT_WAITING, 0, through, limit)
        except OutboxError as error:
            if not is_corrupt(error.__cause__):
                raise
            return min(position.pending, limit)  # of what was recorded later, some may be in it

    def _count(self, query: str, after: int, through: int, limit: int) -> int:
        """Count some at a time, so that no ``record()`` waits for all of it."""
        count = 0
        while count < limit:
            slice_size = min(_SLICE, limit - count)
            values = (after, through, slice_size)
            with self._reading() as connection:
                some, after = retry_busy(functools.partial(one_row, connection, query, values))
            count += some
            if some < slice_size:
                break
            _threads.native_sleep(_GAP)
        return count


@contextmanager
def _one_snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    if connection.in_transaction:  # a signal handler's call, within its thread's transaction
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def read_position(connection: sqlite3.Connection) -> Position:
    """Return counters and watermark as they are stored; raise if they cannot be what was stored."""
    # One statement, so one snapshot: another process may settle at any time.
    try:
        row = one_row(connection, POSITION)
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        row = one_row(connection, POSITION_PAST_DAMAGE)
    (
        through, accepted, rejected, discarded, damaged, rejections, streak, pauses, probe_requests, last_id,
        refusal, kind, reason, until, wait_ms, drainer_pid, *load, waiting, fresh,
    ) = row  # fmt: skip
    _check(row)
    oldest = min((i for i in (fresh, waiting) if i is not None), default=None)
    return Position(
        last_id=last_id,
        drained_through=through,
        accepted=accepted,
        rejected=rejected,
        discarded=discarded,
        damaged=damaged,
        rejections=rejections,
        refusal_streak=streak,
        refusal_reason=refusal,
        hold=Hold(kind=kind, reason=reason, until=until, wait_ms=wait_ms, number=pauses) if kind else None,
        pauses=pauses,
        probe_requests=probe_requests,
        drainer_pid=drainer_pid,
        load=_load(*load),
        oldest_pending=None if oldest is None else (oldest, _recorded_at(connection, oldest)),
    )


def _load(in_flight: object, limit: object, rate: object) -> Load:
    if not (isinstance(in_flight, int) and isinstance(limit, int) and isinstance(rate, float | None)):
        return Load()  # damaged; nothing depends on it
    return Load(in_flight, limit, rate)


def _check(row: tuple[Any, ...]) -> None:
    """Raise if this cannot be what was stored: the counters have no checksum."""
    numbers, refusal, (kind, reason, until, wait_ms, drainer_pid) = row[:10], row[10], row[11:16]
    sound = (
        all(isinstance(number, int) and number >= 0 for number in numbers)
        and isinstance(refusal, str | None)
        and isinstance(drainer_pid, int | None)
    )
    held = (
        isinstance(kind, str)
        and isinstance(reason, str)
        and isinstance(until, int)
        and isinstance(wait_ms, int)
    )
    if not sound or not (kind is None or (held and abs(until) < LAST_MOMENT)):
        raise corrupt("perqueue_drain holds what was never stored there")
    accepted, rejected, discarded, damaged = row[1:5]
    if accepted + rejected + discarded + damaged > row[9]:
        # A new activity would get a number that has an outcome already.
        raise corrupt("there are more outcomes than activities")


def _recorded_at(connection: sqlite3.Connection, activity_id: int) -> int:
    try:
        row = connection.execute(RECORDED_AT, (activity_id,)).fetchone()
    except sqlite3.DatabaseError as error:
        if not is_corrupt(error):
            raise
        return 0
    return row[0] if row and isinstance(row[0], int) else 0
