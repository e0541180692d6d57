"""Who may deliver what: each drainer's lease, by the database's clock, and how it hears of news.

A drainer writes until when it is alive, every two seconds; what it has claimed is its own until then. Once
that time is over anybody may claim it, and whoever comes back late finds that it owns nothing any more. It
also knows by its own clock: then it sends nothing until it has begun anew, under another number.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING, LiteralString

import psycopg

from perqueue._outbox.postgres.counts import ALIVE, CountedSession
from perqueue._outbox.postgres.session import thread_id
from perqueue._outbox.protocol import Load
from perqueue._stats import Gate
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from psycopg import Notify

    from perqueue._outbox.postgres.connection import Connection
    from perqueue._outbox.protocol import Hold

LEASE = 10.0
"""Seconds after which what a dead or frozen drainer has claimed is another's."""
MARGIN = 0.2
"""Part of a lease that a drainer does not count on: its answer may have taken that long."""
PROBE_LEASE = 15.0
"""Seconds after which a probe of which nothing is heard stands in nobody's way."""
_FORGET_AFTER = 3600.0
"""Seconds after which a dead drainer's counters are added to the outbox's own."""
_AWAKE = 2.0
"""Seconds without news after which a drainer sleeps: recorders must wake it."""
_LOOK_AWAKE, _LOOK_DEAF, _LOOK_ASLEEP = 0.25, 1.0, 5.0
"""Seconds between two looks: while there is something to do; without LISTEN, which poolers drop; with it."""
GIVE_WAY = 3.0
"""Seconds for which a drainer that gets no answers leaves it to others to try: they need one to notice."""
_PROBE_INTERVAL = 0.25
"""Seconds between two tries to be the one that probes."""
_STILL_ANSWERED = {Gate.BACKING_OFF: 3.0, Gate.BAD_TOKEN: None}
"""Seconds for which an answer to one drainer says that the others' trouble is their own.

None: the others' tokens may be good ones as long as they drain; whose token is refused ends its term.
"""

_REGISTER = (
    "INSERT INTO perqueue_drainer"
    " (owner, host, pid, alive_until, asleep, in_flight, in_flight_limit, rate_limit)"
    " VALUES (%s, %s, %s, clock_timestamp() + %s * interval '1 second', %s, %s, %s, %s)"
    " ON CONFLICT (owner) DO UPDATE SET alive_until = excluded.alive_until, asleep = excluded.asleep,"
    " in_flight = excluded.in_flight, in_flight_limit = excluded.in_flight_limit,"
    " rate_limit = excluded.rate_limit RETURNING"
    f" (SELECT avg(rate_limit) FROM perqueue_drainer WHERE NOT asleep AND {ALIVE}"
    " HAVING count(rate_limit) > 1)"
)
WAKE: LiteralString = (
    f"CASE WHEN EXISTS (SELECT FROM {{drainer}} WHERE asleep AND {ALIVE})"
    " THEN pg_notify(?::text, '')::text END"
)
"""Wakes whoever sleeps, at the commit. One that falls asleep later finds what there is at its next look."""
_FOLD = (
    "WITH gone AS (DELETE FROM perqueue_drainer WHERE {} RETURNING accepted)"
    " UPDATE perqueue_outbox SET accepted = accepted + (SELECT sum(accepted) FROM gone)::bigint"
    " WHERE EXISTS (SELECT FROM gone WHERE accepted > 0)"
)
_FOLD_DEAD = _FOLD.format("alive_until < clock_timestamp() - %s * interval '1 second'")
_FOLD_OWN = _FOLD.format("owner = %s")
_LET_GO_OF_PROBE = "UPDATE perqueue_outbox SET probe_owner = NULL, probe_until = NULL WHERE probe_owner = %s"
_LET_GO = "UPDATE perqueue_pending SET owner = NULL WHERE id = ANY(%s::bigint[]) AND owner = %s RETURNING id"
_TAKE_PROBE = (
    "UPDATE perqueue_outbox SET probe_owner = %s, probe_until = clock_timestamp() + %s * interval '1 second'"
    " WHERE hold IS NULL OR probe_owner = %s OR coalesce(probe_until, '-infinity')"
    " NOT BETWEEN clock_timestamp() AND clock_timestamp() + interval '20 seconds'"
    " RETURNING id"
)
_SET_HOLD = (
    "UPDATE perqueue_outbox SET hold = %s, hold_reason = %s, hold_wait_ms = %s, holds = holds + 1,"
    " hold_until = clock_timestamp() + %s * interval '1 millisecond', probe_owner = NULL, probe_until = NULL"
    f" WHERE NOT EXISTS (SELECT FROM perqueue_drainer WHERE owner <> %s AND {ALIVE}"
    " AND (%s::float8 IS NULL OR answered_at > clock_timestamp() - %s * interval '1 second'))"
    f" RETURNING holds, EXISTS (SELECT FROM perqueue_drainer WHERE owner <> %s AND {ALIVE})"
)
_END_HOLD = (
    "UPDATE perqueue_outbox SET hold = NULL, hold_reason = NULL, hold_until = NULL, hold_wait_ms = NULL,"
    " probe_owner = NULL, probe_until = NULL WHERE hold IS NOT NULL"
)


class LeasedSession(CountedSession):
    """An outbox in a database, of which this process may drain a part."""

    _owner: int | None = None
    _lease_until = float("-inf")
    _asleep = False
    _awake_until = _look_at = _probe_at = float("-inf")
    _changes = 0
    _told = _listening = False
    _load = Load()
    _failures = 0
    """Rounds in a row in which this drainer got no answer, and others may have."""
    _refrain_until = float("-inf")

    def begin_term(self) -> None:
        """Register as a drainer, under a new number, in the thread that drains from now on."""
        self._drain_thread = thread_id()
        owner = secrets.randbits(62) + 1
        self._extend(owner)
        self._rows(_FOLD_DEAD, (_FORGET_AFTER,))
        self._owner, self._claimed = owner, set[int]()

    def end_term(self) -> None:
        """Let others have what is claimed; without a word if the database cannot be asked: they will."""
        owner, self._owner = self._owner, None
        self._lease_until = float("-inf")
        if owner is not None:
            with suppress(OutboxError):
                self._rows(_FOLD_OWN, (owner,))
                self._rows(_LET_GO_OF_PROBE, (owner,))
                if self._claimed and self._rows(_LET_GO, (list(self._claimed), owner)):
                    self._tell_others()

    def holds_lease(self) -> bool:
        """Tell whether what this drainer has claimed is still its own."""
        return boot_time() < self._lease_until

    def keep_lease(self) -> float | None:
        """Extend the lease, unless it is over: then others may have taken over already."""
        if self._owner is None or not self.holds_lease():
            return None
        fell_asleep = not self._asleep and time.monotonic() > self._awake_until
        self._asleep = self._asleep or fell_asleep
        mean = self._extend(self._owner)
        if fell_asleep:
            self._look_at = float("-inf")  # for what was recorded just before, and woke nobody
        return mean

    def _extend(self, owner: int) -> float | None:
        began = boot_time()
        rows = self._rows(_REGISTER, (owner, host_name(), os.getpid(), LEASE, self._asleep, *self._load))
        self._lease_until = began + LEASE * (1 - MARGIN)
        return None if rows[0][0] is None else float(rows[0][0])

    def lose_lease(self) -> None:
        """Begin anew, without what is claimed: others may have it, or nobody knows what it is."""
        self._lease_until = float("-inf")

    # -- hearing of news

    def _prepare_to_drain(self, connection: Connection) -> None:
        self._listening = False
        if connection.is_pooled:
            return  # it would be another program's server process that listens afterwards
        connection.add_notify_handler(self._hear)
        connection.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(self._channel)))
        connection.execute("SELECT pg_notify(%s, 'listening')", (self._channel,))

    def _hear(self, notify: Notify) -> None:
        self._listening = True
        if notify.payload != "listening":
            self._told = True

    def change_counter(self) -> int:
        """Return a number that differs when another process may have written."""
        now = time.monotonic()
        connection = self._drain_connection
        if connection is None or not connection.is_alive():
            self._look_at = min(self._look_at, now + _LOOK_DEAF)
        else:
            while (notify := connection.pgconn.notifies()) is not None:
                self._hear(psycopg.Notify("", notify.extra.decode(), notify.be_pid))
        if self._told:
            self._told = False
            self.stay_awake()
        elif now < self._look_at:
            return self._changes
        self._changes += 1
        if not self._asleep or now < self._awake_until:
            self._look_at = now + _LOOK_AWAKE
        else:
            self._look_at = now + (_LOOK_ASLEEP if self._listening else _LOOK_DEAF)
        return self._changes

    def stay_awake(self) -> None:
        """There is something to do, and so there may be more."""
        now = time.monotonic()
        self._awake_until = now + _AWAKE
        self._look_at = min(self._look_at, now + _LOOK_AWAKE)
        self._asleep = False

    def request_probe(self) -> None:
        """Ask the draining processes, whichever they are, to try at once."""
        self._rows(
            "UPDATE perqueue_outbox SET probe_requests = probe_requests + 1 RETURNING pg_notify(%s, '')",
            (self._channel,),
        )

    def _tell_others(self) -> None:
        self._rows("SELECT pg_notify(%s, '')", (self._channel,))

    # -- why nothing is sent, for all drainers

    def take_probe(self) -> bool:
        """Tell whether this drainer, of all of them, may ask whether Per answers again."""
        now = time.monotonic()
        if self._owner is None or now < self._probe_at:
            return False
        self._probe_at = now + _PROBE_INTERVAL
        return bool(self._rows(_TAKE_PROBE, (self._owner, PROBE_LEASE, self._owner)))

    def set_hold(self, hold: Hold | None) -> Hold | None:
        """Store why nothing is sent, and return it with its number.

        Trouble that only this drainer has is not stored: as long as others are answered, nothing is held.
        """
        if hold is None:
            self._failures = 0
            self._rows(_END_HOLD)
            self._tell_others()
            return None
        answered = _STILL_ANSWERED.get(Gate(hold.kind), 0.0)
        waits = (hold.wait_ms, hold.wait_ms)
        owner = self._owner or 0
        stored = self._rows(_SET_HOLD, (hold.kind, hold.reason, *waits, owner, answered, answered, owner))
        others = not stored or stored[0][1]
        self._failures = self._failures + 1 if others and hold.kind == Gate.BACKING_OFF else 0
        if self._makes_way():
            self._refrain_until = time.monotonic() + max(GIVE_WAY, hold.wait_ms / 1000)
            self.lose_lease()
        self._tell_others()
        return hold._replace(number=stored[0][0] if stored else 0)

    def _makes_way(self) -> bool:
        """Tell whether others had better try: whose trouble it is shows only when they do."""
        return self._failures > 1

    def set_drainer(self, pid: int | None, load: Load) -> None:  # noqa: ARG002 - drainers have their own table
        """Tell how busy this drainer is, when it next says that it is alive."""
        self._load = load


def boot_time() -> float:
    """Return seconds that go on while the machine sleeps: the other hosts' leases run on meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def host_name() -> str:
    """Return what other hosts know this one by."""
    return os.uname().nodename
