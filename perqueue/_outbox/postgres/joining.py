"""One activity in a transaction of the application's own: what its connection has to run.

That may be another role's, with another search path: everything is named in full.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from weakref import WeakSet

from perqueue._outbox.postgres.counts import MOST_COUNTED, ROOM, as_counted
from perqueue._outbox.postgres.leases import WAKE
from perqueue._outbox.postgres.settling import SettledSession
from perqueue._words import counted
from perqueue.exceptions import ConfigurationError, OutboxFull

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox.protocol import Key, Steps

FOREVER = 2**62
_ROOM_INTERVAL = 5.0
"""Seconds between two looks at how much is pending, while there is room for what this process records."""

# Which outbox is asked first, by a statement that cannot fail: a failed one ends the transaction.
_WHICH = "SELECT to_regclass(?)::text"
# An application that joins may see numbers only, not which of them wait: it cannot skip what was deleted.
_ROOM = ROOM.format(few=f"(SELECT FROM {{schema}}.perqueue_pending LIMIT {MOST_COUNTED + 1})")
_JOIN = (
    "WITH recorded AS ("
    "INSERT INTO {schema}.perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
    " SELECT ?::text, ?::text, ?::text, ?::bigint FROM {schema}.perqueue_outbox WHERE outbox_id = ?::text"
    " RETURNING id) SELECT id, {wake} FROM recorded"
)
_JOIN_ONCE = (
    "SELECT {schema}.perqueue_record_once("
    "?::text, ?::text, ?::text, ?::bigint, ?::bigint, ?::bigint, true), {wake}"
    " FROM {schema}.perqueue_outbox WHERE outbox_id = ?::text"
)
_WAKE = WAKE.format(drainer="{schema}.perqueue_drainer")
_WAKE_NOBODY = "?::text"


class JoinedSession(SettledSession):
    """An outbox in a database into which the application's own transactions can record."""

    dialect = "postgresql"
    _room = 0
    _room_until = float("-inf")

    def __init__(self, url: DatabaseURL, origin: str | None, *, create: bool, max_pending: int) -> None:
        self._max_pending = max_pending
        # Connections that lead to the outbox's database: a round trip less for each activity.
        self._known: WeakSet[object] = WeakSet()
        super().__init__(url, origin, create=create)

    def joining(
        self,
        key: Key,
        window: tuple[int, int] | None,
        recorded_at: int,
        driven: object,
        *,
        quietly: bool = False,
    ) -> Steps:
        """Yield what the application's connection has to run, and return the ID of the activity.

        Raises :class:`ConfigurationError` for a connection to another database, :class:`OutboxFull`.
        """
        if driven not in self._known:
            rows = yield _WHICH, (f"{self._schema}.perqueue_outbox",)
            if rows[0][0] is None:
                self._elsewhere()
            self._known.add(driven)
        if self._must_count():
            table = f"{self._schema}.perqueue_pending"
            rows = yield self._named(_ROOM), (table, self._max_pending)
            self._check_room(as_counted(rows[0]))
        values: tuple[object, ...] = (*key, recorded_at)
        wake = _WAKE_NOBODY if quietly else _WAKE
        if window is None:
            rows = yield self._named(_JOIN, wake), (*values, self._outbox_id, self._channel)
        else:
            rows = yield self._named(_JOIN_ONCE, wake), (*values, *window, self._channel, self._outbox_id)
        if not rows:
            self._elsewhere()
        return int(rows[0][0])

    def _named(self, statement: str, wake: str = "") -> str:
        schema = self._schema
        if set(schema) & set("%?"):  # which some driver takes for a placeholder: as Unicode escapes
            schema = "U&" + "".join(f"\\{ord(c):04x}" if c in "%?\\" else c for c in schema)
        return statement.format(schema=schema, wake=wake.format(schema=schema))

    def _elsewhere(self) -> None:
        message = f"connection leads to another database: the outbox in {self._url} is not there"
        raise ConfigurationError(message)

    # -- max_pending

    def _must_count(self) -> bool:
        """Take a place, and tell whether it must be asked for: many are handed out at a time."""
        if self._max_pending >= FOREVER:
            return False
        self._room -= 1
        return self._room < 0 or time.monotonic() >= self._room_until

    def _check_room(self, pending: int) -> None:
        self._room = self._max_pending - pending - 1
        self._room_until = time.monotonic() + _ROOM_INTERVAL
        if self._room < 0:
            message = (
                f"the outbox holds {counted(pending, 'undelivered activity')}, and max_pending is"
                f" {self._max_pending}: nothing was stored; `perqueue status` says why they wait"
            )
            raise OutboxFull(message)
