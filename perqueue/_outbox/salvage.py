"""Making a new outbox of what can still be read of a damaged one.

An activity is believed if its checksum fits, an outcome if its own does. What has no outcome that is to be
believed is pending: that it may be sent twice changes no bill of its period, that it is lost would.
"""

from __future__ import annotations

import os
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perqueue._activity import State, checksum
from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.connection import connect, set_up, storage_errors, sync_directory
from perqueue._outbox.damage import is_sound, one_row, settlement_checksum
from perqueue._outbox.pages import Pages
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from perqueue._outbox.pages import Row

_ACTIVITY = (
    "INSERT OR IGNORE INTO perqueue_activity"
    " (id, billing_id, user_id, activity_type_id, recorded_at, checksum)"
    " VALUES (?, CAST(? AS TEXT), CAST(? AS TEXT), CAST(? AS TEXT), ?, ?)"
)
_SETTLEMENT = (
    "INSERT OR IGNORE INTO perqueue_settlement"
    " (activity_id, state, settled_at, duration_ms, attempts, transaction_id, reason, checksum)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_RETRY = (
    "INSERT OR IGNORE INTO perqueue_retry (activity_id, attempts, not_before, reason) VALUES (?, ?, ?, ?)"
)
_ATTEMPT = (
    "INSERT OR IGNORE INTO perqueue_attempt (id, activity_id, attempted_at, duration_ms, reason)"
    " VALUES (?, ?, ?, ?, ?)"
)
_GAPS_NAMED = 20
_BESIDE = ("", "-wal", "-shm", "-setup.lock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvaged:
    """What a salvage found, as the new outbox counts it."""

    origin: str | None
    """What the new outbox belongs to; None if that could not be read."""
    pending: int
    accepted: int
    """Including those that were delivered and pruned long ago."""
    rejected: int
    discarded: int
    damaged: int
    """Rows that could be read, and are not what was recorded: kept, and never sent."""
    missing: int
    """Activities of which nothing could be read."""
    counted: bool
    """Whether the old counters could be read; otherwise those that were pruned are among the missing."""
    outcomes_only: int
    """Accepted or discarded ones of which nothing but the outcome could be read."""
    renumbered: int
    """Pending ones whose number was in doubt, so that they have a new one."""
    gaps: tuple[tuple[int, int], ...]
    """First and last numbers of the first 20 gaps."""


def salvage(path: Path, new: Path, origin: str | None = None) -> Salvaged:
    """Write everything that can be read of the outbox at ``path`` into a new one.

    It belongs to ``origin``; without one to that of the old file, if it can be read. No process may use the
    old one meanwhile; it is not changed. The new one belongs to the old one's owner, if this process may
    give it away. Raises :class:`perqueue.OutboxError`, also if there is nothing of an outbox at ``path``;
    then there is no new file.
    """
    with storage_errors(new):
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    try:
        set_up(new, origin, create=True)
        with (
            storage_errors(path),
            Pages(path) as pages,
            storage_errors(new),
            closing(connect(new)) as connection,
        ):
            connection.execute("BEGIN IMMEDIATE")
            work = _Salvage(connection)
            for row in pages.rows():
                work.take(row)
            work.must_have_found(path)
            found = work.finish()
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            sync_directory(new)
        with storage_errors(new):
            _give_to_owner(new, path)
    except BaseException:
        for suffix in _BESIDE:
            with suppress(OSError):
                new.with_name(new.name + suffix).unlink()
        raise
    return found


def _give_to_owner(new: Path, path: Path) -> None:
    """Make the new file theirs whose the old one is: only the superuser can, and must."""
    if os.geteuid() != 0:
        return
    status = path.stat()
    for suffix in _BESIDE:
        with suppress(FileNotFoundError):
            beside = new.with_name(new.name + suffix)
            os.chown(beside, status.st_uid, status.st_gid, follow_symlinks=False)


class _Salvage:
    """A new outbox that is being filled."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._damaged: dict[int, tuple[Any, ...]] = {}
        self._doubtful: dict[int, tuple[Any, ...]] = {}
        self._unnumbered: list[tuple[Any, ...]] = []
        self._refusals: list[tuple[int, int]] = []
        self._unsettled: set[int] = set()
        self._leaps: list[tuple[int, tuple[Any, ...]]] = []
        self._known: tuple[int, int] | None = None  # by the old counters: pruned, and missing since before
        self._is_empty = True

    @property
    def _pruned(self) -> int:
        return self._known[0] if self._known else 0

    def take(self, row: Row) -> None:
        """Store a row in its place, if it is one of ours and can be believed."""
        before = self._connection.total_changes
        self._take(row)
        kept = self._damaged or self._doubtful or self._unnumbered or self._known
        if kept or self._connection.total_changes != before:
            self._is_empty = False

    def must_have_found(self, path: Path) -> None:
        """Raise if there was no row of an outbox."""
        if self._is_empty:
            message = f"nothing of an outbox could be found in {path}: there is no new file"
            raise OutboxError(message)

    def _take(self, row: Row) -> None:
        match row.values:
            case (None, str(), str(), str(), int(), int()):
                self._take_activity(row)
            case (None, int(), int(), int(), int(), str() | None, str() | None, int() | None, int()):
                self._take_settlement(row)
            case (None, *numbers, str() | None as reason) if row.certain and _are_numbers(numbers):
                self._take_failure(row.key, numbers, reason)
            case (None, str(), int(), str() as origin, str()) if row.certain and row.key == 1:
                if origin.isascii():
                    self._execute("UPDATE perqueue_outbox SET origin = ? WHERE origin IS NULL", (origin,))
            case (None, int(), int(), int(), int(), int(), int(missing), int(pruned), *rest) if (
                len(rest) in (10, 14) and row.certain and row.key == 1
            ):
                self._known = (pruned, missing)

    def _take_activity(self, row: Row) -> None:
        activity: tuple[Any, ...] = (row.key, *row.values[1:])
        if checksum(*activity[1:5]) != activity[5]:
            if row.certain and row.ordered:
                self._damaged[row.key] = activity
        elif not row.certain:
            self._doubtful[row.key] = activity
        elif not row.ordered:
            self._unnumbered.append(activity)
        elif self._insert(activity) and row.skipped > 0:
            self._leaps.append((row.skipped, activity))

    def _insert(self, activity: tuple[Any, ...]) -> bool:
        if self._execute(_ACTIVITY, activity).rowcount:
            return True
        query = (
            "SELECT id, billing_id, user_id, activity_type_id, recorded_at, checksum"
            " FROM perqueue_activity WHERE id = ?"
        )
        if one_row(self._connection, query, activity[:1]) != activity:
            self._unnumbered.append(activity)
            self._unsettled.add(activity[0])  # nobody knows whose outcome that is
        return False

    def _take_failure(self, key: int, numbers: list[Any], reason: str | None) -> None:
        """Take an attempt that failed, or a wait of an activity's own: neither has a checksum."""
        text = (
            None if reason is None else reason.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        )
        if len(numbers) == 3 and text is not None:
            self._execute(_ATTEMPT, (key, *numbers, text))
        elif len(numbers) == 2:
            self._execute(_RETRY, (key, *numbers, text))

    def _take_settlement(self, row: Row) -> None:
        _, state, settled_at, duration, attempts, transaction_id, reason, rejection, check = row.values
        outcome = (row.key, state, settled_at, transaction_id, reason, check)
        if not is_sound(outcome) or state not in list(State)[1:]:
            return
        # A row that SQLite could not read may be found here: then nothing is wrong with it.
        if state == State.DAMAGED:
            return
        if state == State.REJECTED and not row.certain:
            return  # it may have been requeued since
        values = (row.key, state, settled_at, duration, attempts, transaction_id, reason, check)
        if self._execute(_SETTLEMENT, values).rowcount and state == State.REJECTED:
            self._refusals.append((rejection if isinstance(rejection, int) else 2**63, row.key))

    def finish(self) -> Salvaged:
        """Put the parts together, and the books in order."""
        self._distrust_leaps()
        self._take_doubtful()
        self._take_damaged()
        for activity_id in self._unsettled:
            self._execute("DELETE FROM perqueue_settlement WHERE activity_id = ?", (activity_id,))
        outcomes_only = self._count_hollow()
        last = self._close_the_end()
        for number, activity in enumerate(self._unnumbered, last + 1):
            self._execute(_ACTIVITY, (number, *activity[1:]))
        self._execute(
            "DELETE FROM perqueue_retry WHERE activity_id IN (SELECT activity_id FROM perqueue_settlement)"
            " OR activity_id NOT IN (SELECT id FROM perqueue_activity)"
        )
        for rejection, (_, activity_id) in enumerate(sorted(self._refusals), 1):
            self._execute(
                "UPDATE perqueue_settlement SET rejection = ? WHERE activity_id = ?", (rejection, activity_id)
            )
        return self._count(last, outcomes_only)

    def _distrust_leaps(self) -> None:
        """Take no number that leaves out more than were ever deleted: no checksum covers the number."""
        if self._known is None:
            return
        for skipped, activity in self._leaps:
            activity_id = activity[0]
            query = "SELECT count(*) FROM perqueue_settlement WHERE activity_id BETWEEN ? AND ?"
            (given,) = one_row(self._connection, query, (activity_id - skipped, activity_id - 1))
            if skipped - given <= sum(self._known) or self._has("settlement", activity_id):
                continue
            self._execute("DELETE FROM perqueue_activity WHERE id = ?", (activity_id,))
            self._unnumbered.append(activity)

    def _count_hollow(self) -> int:
        """Count the outcomes without an activity; a refused one, which cannot be sent again, is damaged."""
        rows = self._execute(
            "SELECT activity_id, state, settled_at FROM perqueue_settlement s"
            " WHERE NOT EXISTS (SELECT 1 FROM perqueue_activity a WHERE a.id = s.activity_id)"
        ).fetchall()
        refused = {activity_id: at for activity_id, state, at in rows if state == State.REJECTED}
        for activity_id, at in refused.items():
            self._execute("DELETE FROM perqueue_settlement WHERE activity_id = ?", (activity_id,))
            self._settle_as_damaged(activity_id, at, "the stored row cannot be read")
        self._refusals = [each for each in self._refusals if each[1] not in refused]
        return len(rows) - len(refused)

    def _settle_as_damaged(self, activity_id: int, at: int, reason: str) -> None:
        check = settlement_checksum(activity_id, State.DAMAGED, at, None, reason)
        self._execute(_SETTLEMENT, (activity_id, State.DAMAGED, at, 0, 0, None, reason, check))

    def _has(self, table: str, activity_id: int) -> bool:
        key = "id" if table == "activity" else "activity_id"
        query = f"SELECT EXISTS (SELECT 1 FROM perqueue_{table} WHERE {key} = ?)"  # noqa: S608 - constants
        return bool(one_row(self._connection, query, (activity_id,))[0])

    def _take_doubtful(self) -> None:
        """Take activities from where there may be old versions of pages, too: as many as are missing.

        Others were delivered, and pruned long ago. Those have the lowest numbers.
        """
        unknown = []
        for activity_id in sorted(self._doubtful, reverse=True):
            if self._has("settlement", activity_id) or self._has("retry", activity_id):
                self._execute(_ACTIVITY, self._doubtful[activity_id])
            elif not self._has("activity", activity_id):
                unknown.append(activity_id)
        (last,) = one_row(self._connection, "SELECT coalesce(max(id), 0) FROM perqueue_activity")
        beyond = sum(activity_id > last for activity_id in unknown)
        absent = sum(high - low + 1 for low, high in self._gaps())
        for activity_id in unknown[: beyond + max(0, absent - self._pruned)]:
            self._execute(_ACTIVITY, self._doubtful[activity_id])

    def _take_damaged(self) -> None:
        (last,) = one_row(self._connection, "SELECT coalesce(max(id), 0) FROM perqueue_activity")
        reason = "the stored row does not match its checksum"
        for activity_id, activity in self._damaged.items():
            # A number far beyond all others is part of the damage.
            if activity_id <= last + 1000 and self._execute(_ACTIVITY, _raw(activity)).rowcount:
                self._settle_as_damaged(activity_id, activity[4], reason)

    def _close_the_end(self) -> int:
        """Return the highest number; a new activity must not get one that has an outcome already."""
        last, last_settled = one_row(
            self._connection,
            "SELECT coalesce((SELECT max(id) FROM perqueue_activity), 0),"
            " coalesce((SELECT max(activity_id) FROM perqueue_settlement), 0)",
        )
        if last_settled > last:
            self._execute(_ACTIVITY, (last_settled, "", "", "", 0, -1))  # of which only the outcome is left
        return max(int(last), int(last_settled))

    def _count(self, numbered: int, outcomes_only: int) -> Salvaged:
        counts = dict(
            self._execute("SELECT state, count(*) FROM perqueue_settlement GROUP BY state").fetchall()
        )
        gaps = self._gaps()
        absent = sum(last - first + 1 for first, last in gaps)
        pruned = min(absent, self._pruned)  # what nobody knows to be delivered is missing
        fresh, last = one_row(
            self._connection,
            "SELECT (SELECT min(a.id) FROM perqueue_activity a WHERE NOT EXISTS"
            " (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id) AND NOT EXISTS"
            " (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = a.id)),"
            " (SELECT coalesce(max(id), 0) FROM perqueue_activity)",
        )
        accepted = counts.get(State.ACCEPTED, 0) + pruned
        rejected, discarded = counts.get(State.REJECTED, 0), counts.get(State.DISCARDED, 0)
        damaged, missing = counts.get(State.DAMAGED, 0), absent - pruned
        self._execute(
            "UPDATE perqueue_drain SET drained_through = ?, accepted = ?, rejected = ?, discarded = ?,"
            " damaged = ?, missing = ?, pruned = ?, rejections = ?, trail_lost_through = ?",
            (
                last if fresh is None else fresh - 1,
                *(accepted, rejected, discarded, damaged, missing, pruned, len(self._refusals)),
                SYSTEM_CLOCK.time_ms(),  # outcomes and attempts may be lost without a gap that shows it
            ),
        )
        (origin,) = one_row(self._connection, "SELECT origin FROM perqueue_outbox")
        return Salvaged(
            origin=origin,
            pending=last - accepted - rejected - discarded - damaged - missing,
            accepted=accepted,
            rejected=rejected,
            discarded=discarded,
            damaged=damaged,
            missing=missing,
            counted=self._known is not None,
            outcomes_only=outcomes_only,
            renumbered=last - numbered,
            gaps=tuple(gaps if missing else ())[:_GAPS_NAMED],
        )

    def _gaps(self) -> list[tuple[int, int]]:
        """Return first and last of every run of numbers of which there is neither row nor outcome."""
        query = (
            "SELECT before + 1, id - 1 FROM (SELECT id, lag(id, 1, 0) OVER (ORDER BY id) AS before FROM"
            " (SELECT id FROM perqueue_activity UNION SELECT activity_id FROM perqueue_settlement))"
            " WHERE id > before + 1"
        )
        return self._execute(query).fetchall()


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, int) for value in values)


def _raw(activity: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a damaged activity so that its texts can be stored even if they are no UTF-8."""
    return tuple(
        value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value for value in activity
    )
