"""Writing down what came of requests, why none are sent, and who sends them."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from typing import TYPE_CHECKING

from perqueue._activity import TRANSITIONS, Activity, Event, State, checksum
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.damage import is_corrupt, is_sound, one_row, settlement_checksum
from perqueue._outbox.joining import JoinedSession
from perqueue._outbox.queries import (
    ACCEPT,
    DEFER,
    IS_THERE,
    LOG_ATTEMPT,
    REFUSAL,
    SETTLE,
)
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from perqueue._activity import Settlement
    from perqueue._outbox.protocol import Hold, Load

    _Books = tuple[int, int, tuple[int, str | None], tuple[Sequence[int], Hold] | None]
    """Epoch, watermark, streak of refusals, and what is to be taken back."""

_FORGET = "UPDATE perqueue_drain SET trail_lost_through = max(trail_lost_through, ?)"


class SettlingSession(JoinedSession):
    """An outbox file into which outcomes are written."""

    lost: Collection[int] = ()
    """Activities of the latest :meth:`settle` that are not there any more: nothing was written."""
    _forgotten_through = 0

    def _went_back(self) -> None:
        super()._went_back()
        self._forgotten_through = SYSTEM_CLOCK.time_ms()

    def settle(
        self,
        settlements: Sequence[Settlement],
        *,
        drained_through: int,
        refusals: tuple[int, str | None],
        take_back: tuple[Sequence[int], Hold] | None = None,
        epoch: int = 0,
    ) -> Hold | None:
        """Write outcomes, the watermark and the streak of refusals in one transaction.

        ``take_back`` names refused activities, of these or earlier ones, that return to pending in the
        same transaction, and why nothing is sent from then on; that hold is returned as stored. All this is
        of an ``epoch``: in another one only outcomes are written, of what was claimed and is still there.
        """
        books = (epoch, drained_through, refusals, take_back)
        try:
            return self._settle(settlements, None, books)
        except OutboxError as error:
            if not is_corrupt(error.__cause__):
                raise
        with self._reading() as connection:  # SQLite writes nothing more in a transaction that met damage
            self._notice(connection)
            there = [s for s in settlements if self._is_there(connection, s.activity)]
        return self._settle(settlements, there, books)

    def _settle(
        self, settlements: Sequence[Settlement], there: Sequence[Settlement] | None, books: _Books
    ) -> Hold | None:
        """Settle those that are ``there``; None: this is to be found out on the way."""
        with self._writing(commits=max(1, len(settlements))) as connection:
            accept = {} if there is not None else ACCEPT
            if there is None:
                self._notice(connection)
                there = [
                    s
                    for s in settlements
                    if s.event is Event.ACCEPT or self._is_there(connection, s.activity)
                ]
            epoch, drained_through, refusals, take_back = books
            if epoch != self.epoch:
                drained_through, refusals, take_back = 0, (0, None), None
            (rejections,) = one_row(connection, "SELECT rejections FROM perqueue_drain")
            outcomes: dict[State, list[Settlement]] = defaultdict(list)
            for s in there:
                outcomes[TRANSITIONS[State.PENDING, s.event]].append(s)
            for s in outcomes[State.PENDING]:
                self._defer(connection, s)
            rejected = 0
            for s in outcomes[State.REJECTED]:
                rejected += self._settle_one(connection, s, State.REJECTED, rejections + rejected + 1)
            sent = outcomes[State.ACCEPTED]
            accepted = self._accept(connection, sent, accept)
            if accept and accepted < len(sent):  # some had an outcome already, or are not there any more
                there = [s for s in there if self._is_there(connection, s.activity)]
            self.lost = {s.activity.id for s in settlements} - {s.activity.id for s in there}
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
    def _is_there(connection: sqlite3.Connection, activity: Activity) -> bool:
        """Tell whether the file still holds what was claimed under this number, as far as it is legible."""
        values = (activity.id, _checksum(activity))
        try:
            return connection.execute(IS_THERE, values).fetchone() is not None
        except sqlite3.DatabaseError as error:
            if not is_corrupt(error):
                raise
            return True

    @staticmethod
    def _defer(connection: sqlite3.Connection, s: Settlement) -> None:
        values = (s.activity.id, s.answered_at - s.duration_ms, s.duration_ms, s.reason)
        connection.execute(LOG_ATTEMPT, values)
        if s.not_before is not None:
            connection.execute(DEFER, (s.activity.id, s.activity.attempts + 1, s.not_before, s.reason))

    @staticmethod
    def _settle_one(
        connection: sqlite3.Connection, s: Settlement, state: State, rejection: int | None = None
    ) -> int:
        """Settle an activity that is there, and return how many were pending: 1 or 0."""
        activity_id, at, transaction_id, reason = s.activity.id, s.answered_at, s.transaction_id, s.reason
        check = settlement_checksum(activity_id, state, at, transaction_id, reason)
        outcome = (activity_id, state, at, s.duration_ms, activity_id, transaction_id, reason)
        settled = connection.execute(SETTLE, (*outcome, rejection, check)).rowcount
        connection.execute("DELETE FROM perqueue_retry WHERE activity_id = ?", (activity_id,))
        return settled

    def _accept(
        self,
        connection: sqlite3.Connection,
        settlements: Sequence[Settlement],
        statements: dict[int, tuple[str, str]],
    ) -> int:
        """Settle accepted activities, many by each statement, and return how many were pending.

        One by one they would hold the write lock more than twice as long: sqlite3 lets go of the interpreter
        in each step, and must win it back.
        """
        done = settled = 0
        for size, (accept, end_wait) in statements.items():
            while len(settlements) - done >= size:
                values: list[object] = []
                for s in settlements[done : done + size]:
                    activity, at, transaction_id = s.activity, s.answered_at, s.transaction_id
                    check = settlement_checksum(activity.id, State.ACCEPTED, at, transaction_id, None)
                    values += (activity.id, at, s.duration_ms, transaction_id, check, _checksum(activity))
                settled += connection.execute(accept, values).rowcount
                connection.execute(end_wait, values[::6])
                done += size
        return settled + sum(self._settle_one(connection, s, State.ACCEPTED) for s in settlements[done:])

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
            if self._forgotten_through:  # by now the trail lacks what was settled since
                connection.execute(_FORGET, (self._forgotten_through,))
        self._forgotten_through = 0

    def request_probe(self) -> None:
        """Ask the draining process, whichever it is, to try at once."""
        with self._writing() as connection:
            connection.execute("UPDATE perqueue_drain SET probe_requests = probe_requests + 1")


def _checksum(activity: Activity) -> int:
    return checksum(activity.billing_id, activity.user_id, activity.activity_type_id, activity.recorded_at)
