"""From where on to look for what is pending, while the database cannot clean up what has left.

Every look from the oldest on goes over what was deleted and not yet vacuumed, and vacuum removes nothing that
the oldest open transaction of the database might still see. When that has become much, the drainers keep the
number up to which nothing is pending, nor can be any more, but what waits on its own account.
"""

from __future__ import annotations

from perqueue._outbox.postgres.leases import LeasedSession

_MANY = 200_000
"""Deleted rows that are no matter: a look goes over them in some hundredths of a second."""
_STEP = 1000
"""The number is written only when it has grown by so much: its old versions stay, too."""

_DELETED = "SELECT pg_stat_get_dead_tuples('perqueue_pending'::regclass), pending_after FROM perqueue_outbox"
# Whoever inserts holds this lock before its row has a number, and until it is committed or not.
_WRITERS = (
    "SELECT virtualtransaction FROM pg_locks"
    " WHERE relation = 'perqueue_pending'::regclass AND mode = 'RowExclusiveLock'"
)
_PREPARED = "-1/"
"""What the name of a prepared transaction begins with: before, it had another."""
_RAISE = (
    "UPDATE perqueue_outbox o SET pending_after = f.after FROM (SELECT coalesce("
    "(SELECT id - 1 FROM perqueue_pending WHERE id > %(after)s AND id <= %(through)s AND not_before IS NULL"
    " ORDER BY id LIMIT 1), %(through)s) AS after) f WHERE f.after >= o.pending_after + %(step)s"
)
_LOWER = "UPDATE perqueue_outbox SET pending_after = 0 WHERE pending_after > 0"


class FlooredSession(LeasedSession):
    """An outbox in a database that knows below which number it need not look."""

    _pending_after = 0
    _undecided: tuple[int, frozenset[str]] | None = None
    """A number, and the transactions that may still commit one up to it."""

    def _find_floor(self, seen: int) -> None:
        """Find the number above which everything fresh is; some activity has the number ``seen``."""
        deleted, self._pending_after = self._row(_DELETED)
        if deleted < _MANY:
            self._undecided = None
            if self._pending_after:
                self._rows(_LOWER)
                self._pending_after = 0
            return
        writers = frozenset(name for (name,) in self._rows(_WRITERS))
        if self._undecided is not None:
            through, undecided = self._undecided
            if undecided & writers or any(name.startswith(_PREPARED) for name in writers):
                return
            self._rows(_RAISE, {"after": self._pending_after, "through": through, "step": _STEP})
        self._undecided = (seen, writers)
