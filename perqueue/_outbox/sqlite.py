"""The outbox in a SQLite file."""

from __future__ import annotations

import functools
import os
import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NoReturn

from perqueue._activity import TRANSITIONS, Activity, State, checksum
from perqueue._outbox.alone import Alone
from perqueue._outbox.connection import BUSY_TIMEOUT, is_busy, outbox_error, retry_busy, storage_errors
from perqueue._outbox.damage import corrupt, is_sound, one_row, settlement_checksum
from perqueue._outbox.joining import JoinedSession
from perqueue._outbox.protocol import Hold, Settled
from perqueue._outbox.queries import (
    ACCEPT,
    APPEND,
    DEFER,
    LOG_ATTEMPT,
    REFUSAL,
    REJECTED_SINCE,
    SETTLE,
    SETTLED,
)
from perqueue._outbox.session import IDENTITY_INTERVAL_MS, is_owned, release_after_all
from perqueue.exceptions import OutboxError, OutboxFull

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from perqueue._activity import Settlement
    from perqueue._outbox.protocol import Key, Load

_FOREVER = 2**62


class SQLiteOutbox(JoinedSession, Alone):
    """An :class:`~perqueue._outbox.protocol.Outbox` in a file of its own, or in an application's."""

    def __init__(
        self,
        path: Path,
        origin: str | None,
        *,
        create: bool = True,
        embedded: bool | None = None,
        power: bool = False,
        max_pending: int = _FOREVER,
    ) -> None:
        self._power = power
        self._max_pending = max_pending
        self._last_id = self._settled_count = 0
        super().__init__(path, origin, create=create, embedded=embedded)
        try:
            self.position()  # a file that makes no sense is not recorded into
        except BaseException:
            self.close()
            raise

    # -- the hot path

    def append(  # noqa: C901, PLR0912 - the hot path is written out: each call in it would cost a tenth of it
        self, billing_id: str, user_id: str, activity_type_id: str, recorded_at: int
    ) -> int:
        """Commit one activity and return its ID."""
        values = (
            billing_id,
            user_id,
            activity_type_id,
            recorded_at,
            checksum(billing_id, user_id, activity_type_id, recorded_at),
        )
        if self._pid != os.getpid():
            self._foreign()
        lock = self._lock
        nested = is_owned(lock)
        try:
            if not nested and not lock.acquire(blocking=False) and not lock.acquire(timeout=BUSY_TIMEOUT):
                self._locked()
            connection = self._connection
            if nested and connection is not None and connection.in_transaction:
                self._in_transaction()
            if connection is None:
                connection = self._usable()
            elif abs(recorded_at - self._checked_at) >= IDENTITY_INTERVAL_MS:
                self._check_identity(recorded_at)
            last_id = self._last_id
            if last_id - self._settled_count >= self._max_pending:
                self._check_room()
            try:
                # The cursor is this call's own, so that a record() from a signal handler in the very
                # next instant cannot change what lastrowid says.
                activity_id: int = connection.execute(APPEND, values).lastrowid  # type: ignore[assignment]
            except (sqlite3.Error, UnicodeDecodeError) as error:
                activity_id = self._append_again(connection, values, error)
            if activity_id <= last_id:
                self._given_twice()
            self._last_id = activity_id
            self._disk.committed()
            if not os.access(self._file, os.F_OK):  # deleted or moved away, by the cheapest look there is
                self._check_identity(recorded_at)
        except BaseException:
            if not nested:
                release_after_all(lock)
            raise
        if not nested:
            lock.release()
        if self._power:  # asked here, too: a call costs a twentieth of the whole
            self._sync()
        return activity_id

    def _sync(self) -> None:
        """Return once what was committed is as safe as ``durability`` asks for."""
        if self._power:
            with storage_errors(self._path):
                self._disk.sync()

    def _insert(self, connection: sqlite3.Connection, key: Key, recorded_at: int) -> int:
        """Do as :meth:`append`, within a transaction."""
        last_id = self._last_id
        if last_id - self._settled_count >= self._max_pending:
            self._check_room()
        activity_id: int = connection.execute(  # type: ignore[assignment]
            APPEND, (*key, recorded_at, checksum(*key, recorded_at))
        ).lastrowid
        if activity_id <= last_id:
            self._given_twice()
        self._last_id = activity_id
        return activity_id

    def _given_twice(self) -> NoReturn:
        # The highest rows are gone: this one would be taken for one that has an outcome.
        raise outbox_error(self._path, corrupt("a number was given twice"))

    def _in_transaction(self) -> NoReturn:
        # It would be committed, or rolled back, with what was interrupted.
        message = (
            "record() was called by a finalizer or a signal handler in the middle of one of perqueue's own"
            " transactions, and cannot be committed there: record it again, from elsewhere"
        )
        raise OutboxError(message)

    def _append_again(
        self, connection: sqlite3.Connection, values: tuple[object, ...], error: Exception
    ) -> int:
        """Wait for a lock that another process holds; any other error is final."""
        if isinstance(error, sqlite3.Error) and is_busy(error):
            with storage_errors(self._path):
                cursor = retry_busy(lambda: connection.execute(APPEND, values))
                return cursor.lastrowid  # type: ignore[return-value]
        self._give_up_connection()
        raise outbox_error(self._path, error) from error

    def _check_room(self) -> None:
        position = self.position()
        self._last_id, self._settled_count = position.last_id, position.last_id - position.pending
        if position.pending >= self._max_pending:
            message = (
                f"the outbox holds {position.pending} undelivered activities, and max_pending is"
                f" {self._max_pending}: nothing was stored; `perqueue status` says why they wait"
            )
            raise OutboxFull(message)

    # -- the drain

    def settle(
        self,
        settlements: Sequence[Settlement],
        *,
        drained_through: int,
        refusals: tuple[int, str | None],
        take_back: tuple[Sequence[int], Hold] | None = None,
    ) -> Hold | None:
        """Write outcomes, the watermark and the streak of refusals in one transaction.

        ``take_back`` names refused activities, of these or earlier ones, that return to pending in the
        same transaction, and why nothing is sent from then on; that hold is returned as stored.
        """
        with self._writing(commits=max(1, len(settlements))) as connection:
            (rejections,) = one_row(connection, "SELECT rejections FROM perqueue_drain")
            outcomes: dict[State, list[Settlement]] = defaultdict(list)
            for s in settlements:
                outcomes[TRANSITIONS[State.PENDING, s.event]].append(s)
            for s in outcomes[State.PENDING]:
                self._defer(connection, s)
            rejected = 0
            for s in outcomes[State.REJECTED]:
                rejected += self._reject(connection, s, rejections + rejected + 1)
            accepted = self._accept(connection, outcomes[State.ACCEPTED])
            connection.execute(
                "UPDATE perqueue_drain SET accepted = accepted + ?, rejected = rejected + ?, rejections = ?,"
                " refusal_streak = ?, refusal_reason = ?, drained_through = max(drained_through, ?)",
                (accepted, rejected, rejections + rejected, *refusals, drained_through),
            )
            if take_back is None:
                return None
            activity_ids, hold = take_back
            self._requeue(connection, activity_ids)
            connection.execute("UPDATE perqueue_drain SET refusal_streak = 0, refusal_reason = NULL")
            return self._write_hold(connection, hold)

    @staticmethod
    def _defer(connection: sqlite3.Connection, s: Settlement) -> None:
        values = (s.activity.id, s.answered_at - s.duration_ms, s.duration_ms, s.reason)
        connection.execute(LOG_ATTEMPT, values)
        if s.not_before is not None:
            connection.execute(DEFER, (s.activity.id, s.activity.attempts + 1, s.not_before, s.reason))

    @staticmethod
    def _reject(connection: sqlite3.Connection, s: Settlement, rejection: int) -> int:
        """Settle a refused activity, and return how many were pending: 1 or 0."""
        activity_id, at = s.activity.id, s.answered_at
        check = settlement_checksum(activity_id, State.REJECTED, at, None, s.reason)
        outcome = (activity_id, State.REJECTED, at, s.duration_ms, activity_id, None, s.reason)
        settled = connection.execute(SETTLE, (*outcome, rejection, check)).rowcount
        connection.execute("DELETE FROM perqueue_retry WHERE activity_id = ?", (activity_id,))
        return settled

    @staticmethod
    def _accept(connection: sqlite3.Connection, settlements: Sequence[Settlement]) -> int:
        """Settle accepted activities, many by each statement, and return how many were pending.

        One by one they would hold the write lock more than twice as long: sqlite3 lets go of the interpreter
        in each step, and must win it back.
        """
        done = settled = 0
        for size, (accept, end_wait) in ACCEPT.items():
            while len(settlements) - done >= size:
                values: list[object] = []
                for s in settlements[done : done + size]:
                    activity_id, at, transaction_id = s.activity.id, s.answered_at, s.transaction_id
                    check = settlement_checksum(activity_id, State.ACCEPTED, at, transaction_id, None)
                    values += (activity_id, at, s.duration_ms, transaction_id, check)
                settled += connection.execute(accept, values).rowcount
                connection.execute(end_wait, values[::5])
                done += size
        return settled

    @staticmethod
    def _requeue(connection: sqlite3.Connection, activity_ids: Iterable[int], attempts: int = 1) -> list[int]:
        """Make those pending that are rejected, and return them; the refusal stays in their history."""
        moved = []
        for activity_id in activity_ids:
            row = connection.execute(REFUSAL, (activity_id,)).fetchone()
            if row is None or row[1] != State.REJECTED or not is_sound(row[:6]):
                continue
            settled_at, reason, duration = row[2], row[4], row[6]
            connection.execute(LOG_ATTEMPT, (activity_id, settled_at - duration, duration, reason))
            connection.execute(DEFER, (activity_id, attempts, 0, reason))
            connection.execute("DELETE FROM perqueue_settlement WHERE activity_id = ?", (activity_id,))
            moved.append(activity_id)
        connection.execute("UPDATE perqueue_drain SET rejected = rejected - ?", (len(moved),))
        return moved

    def set_hold(self, hold: Hold | None) -> Hold | None:
        """Store why nothing is sent, and return it with its number."""
        with self._writing() as connection:
            if hold is not None:
                return self._write_hold(connection, hold)
            connection.execute(
                "UPDATE perqueue_drain"
                " SET hold = NULL, hold_reason = NULL, hold_until = NULL, hold_wait_ms = NULL"
            )
        return None

    @staticmethod
    def _write_hold(connection: sqlite3.Connection, hold: Hold) -> Hold:
        connection.execute(
            "UPDATE perqueue_drain SET hold = ?, hold_reason = ?, hold_until = ?, hold_wait_ms = ?,"
            " holds = holds + 1",
            (hold.kind, hold.reason, hold.until, hold.wait_ms),
        )
        (number,) = one_row(connection, "SELECT holds FROM perqueue_drain")
        return hold._replace(number=number)

    def set_drainer(self, pid: int | None, load: Load) -> None:
        """Store which process drains, and how busy it is."""
        with self._writing() as connection:
            connection.execute(
                "UPDATE perqueue_drain"
                " SET drainer_pid = ?, in_flight = ?, in_flight_limit = ?, rate_limit = ?",
                (pid, *load),
            )

    def request_probe(self) -> None:
        """Ask the draining process, whichever it is, to try at once."""
        with self._writing() as connection:
            connection.execute("UPDATE perqueue_drain SET probe_requests = probe_requests + 1")

    # -- what there is

    def settled(self, activity_ids: Iterable[int]) -> dict[int, Settled]:
        """Return the outcomes of those that have one."""
        ids = list(activity_ids)
        found: dict[int, Settled] = {}
        for start in range(0, len(ids), 500):
            some = ids[start : start + 500]
            query = SETTLED.format(", ".join("?" * len(some)))
            with self._reading() as connection:
                rows = retry_busy(functools.partial(_fetch, connection, query, some))
            for row in filter(is_sound, rows):  # nothing is told that is not Per's word
                activity_id, state, settled_at, transaction_id, reason = row[:5]
                found[activity_id] = Settled(
                    state=State(state), transaction_id=transaction_id, reason=reason, settled_at=settled_at
                )
        return found

    def last_reason(self, activity_id: int) -> str | None:
        """Return why the latest attempt to deliver an activity failed; None if none has."""
        query = "SELECT reason FROM perqueue_attempt WHERE activity_id = ? ORDER BY id DESC LIMIT 1"
        with self._reading() as connection:
            row = retry_busy(lambda: connection.execute(query, (activity_id,)).fetchone())
        return None if row is None else str(row[0])

    def rejected_since(self, rejection: int, limit: int) -> list[Activity]:
        """Return activities that are rejected now, by refusals after a number."""
        with self._reading() as connection:
            rows = retry_busy(lambda: connection.execute(REJECTED_SINCE, (rejection, limit)).fetchall())
        return self._sorted_out(rows)[0]  # these are settled: a damaged one is found if it is requeued

    def change_counter(self) -> int:
        """Return a number that differs when another process has written."""
        # Written for an idle process, which does little else: several times cheaper than _reading().
        with self._lock:
            try:
                (version,) = one_row(self._usable(), "PRAGMA data_version")
            except (sqlite3.Error, UnicodeDecodeError) as error:
                if isinstance(error, sqlite3.Error) and is_busy(error):  # without a WAL, by any commit
                    with self._reading() as connection:
                        (version,) = retry_busy(lambda: one_row(connection, "PRAGMA data_version"))
                else:
                    raise outbox_error(self._path, error) from error
        # data_version tells changes on one connection only: another one may begin with the same number.
        return int(version) + (self._openings << 32)


def _fetch(connection: sqlite3.Connection, query: str, values: Sequence[object]) -> list[Any]:
    return connection.execute(query, values).fetchall()
