"""What is right and wrong with an outbox in a database, its server and its drainers."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

import psycopg

from perqueue._outbox.finding import moment, ok, problem, warning
from perqueue._outbox.flow import Backlog, judge, refused, trail
from perqueue._outbox.postgres.connection import LONG_PATIENCE, MOST_CONNECTIONS
from perqueue._outbox.postgres.counts import ALIVE, CountedSession

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._address import DatabaseURL
    from perqueue._outbox.finding import Finding
    from perqueue._outbox.flow import Known

_OLDEST_SERVER = 130000
_OLD_TRANSACTION = 900
"""Seconds for which a transaction may hold up vacuum before that is worth a word."""
_SKEW_MS = 60_000
_SLOW_MS = 20.0
_STALE = 3600

_SERVER = (
    "SELECT current_setting('server_version'), current_setting('server_version_num')::int,"
    " coalesce(host(inet_server_addr()), 'a socket'), pg_is_in_recovery(),"
    " current_setting('synchronous_commit'), current_setting('fsync'),"
    " (extract(epoch FROM clock_timestamp()) * 1000)::bigint,"
    " current_setting('max_connections')::int, (SELECT sum(numbackends) FROM pg_stat_database)::int"
)
_RIGHTS = (
    # Of several in one call any is enough.
    "SELECT bool_and(has_table_privilege(oid, 'INSERT') AND has_table_privilege(oid, 'UPDATE')"
    " AND (has_table_privilege(oid, 'DELETE') OR relname = 'perqueue_outbox')),"
    " pg_size_pretty(sum(pg_total_relation_size(oid)))"
    " FROM pg_class WHERE oid = ANY(%s::regclass[])"
)
_OLDEST_TRANSACTION = (
    "SELECT extract(epoch FROM clock_timestamp() - xact_start)::int, pid, coalesce(application_name, ''),"
    " state FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL"
    " AND backend_type = 'client backend' ORDER BY xact_start LIMIT 1"
)
_DRAINERS = (
    f"SELECT host, pid, (extract(epoch FROM since) * 1000)::bigint, {ALIVE},"
    " extract(epoch FROM clock_timestamp() - alive_until)::int FROM perqueue_drainer ORDER BY since"
)
_REFUSED = (
    "SELECT reason, count(*) FROM perqueue_settled WHERE rejection IS NOT NULL"
    " GROUP BY reason ORDER BY count(*) DESC, reason"
)
_ANSWERED = (
    "SELECT max(settled_at) FROM (SELECT settled_at FROM perqueue_settled ORDER BY id DESC LIMIT 300) s"
)
_FUTURE = (
    "SELECT max(recorded_at) FROM (SELECT recorded_at FROM perqueue_pending ORDER BY id DESC LIMIT 1000) p"
)
_LOST = "SELECT trail_lost_through FROM perqueue_outbox"
_TABLES = ("pending", "settled", "attempt", "drainer", "outbox", "coalesced")


class Examination(CountedSession):
    """Looks at one outbox; every method yields findings, and may raise :class:`~perqueue.OutboxError`."""

    _patience = LONG_PATIENCE

    def __init__(self, url: DatabaseURL) -> None:
        """Raise :class:`~perqueue.OutboxError` if it cannot be looked at, or is none."""
        super().__init__(url, None, create=False)

    def server(self, now: int) -> Iterator[Finding]:
        """Look at the server, the way to it, and what this role may do; ``now`` is this host's clock."""
        began = time.monotonic()
        version, number, host, standby, commits, fsync, clock, most, used = self._row(_SERVER)
        took = (time.monotonic() - began) * 1000
        text = f"PostgreSQL {version} at {host}, psycopg {psycopg.__version__}, answers in {took:.1f} ms"
        if number < _OLDEST_SERVER:
            yield problem("server", text, "use PostgreSQL 13 or newer")
        elif took > _SLOW_MS:
            yield warning("server", text, "record() waits as long: a file on each host does not")
        else:
            yield ok("server", text)
        if standby:
            yield problem("server", "it is a standby: it takes no writes", "name the primary, or all hosts")
        durability = f"synchronous_commit is {commits}, fsync is {fsync}"
        if fsync == "off" or commits == "off":
            yield warning("durability", f"{durability}: a crash takes commits back", "set both to on")
        else:
            yield ok("durability", durability)
        yield self._connections(most, used)
        skew = clock - now - took / 2
        if abs(skew) > _SKEW_MS:
            side = "ahead of" if skew > 0 else "behind"
            text = f"the server's clock is {abs(skew) / 1000:,.0f} s {side} this host's"
            yield warning("skew", text, "NTP: leases go by the server's clock, recorded_at by each host's")
        yield from self._rights()
        yield from self._transactions()

    @staticmethod
    def _connections(most: int, used: int) -> Finding:
        text = f"{used} of {most} connections are in use"
        if most - used <= MOST_CONNECTIONS:
            return warning("connections", text, "raise max_connections, or put a pooler before the server")
        return ok("connections", text)

    def _rights(self) -> Iterator[Finding]:
        names = [f"{self._schema}.perqueue_{name}" for name in _TABLES]
        writes, size = self._row(_RIGHTS, (names,))
        text = f"schema {self._schema}, {size} in all"
        if writes:
            yield ok("tables", text)
        else:
            yield problem("tables", f"{text}: this role may not write them", "GRANT it the perqueue_ tables")

    def _transactions(self) -> Iterator[Finding]:
        rows = self._rows(_OLDEST_TRANSACTION)
        if rows and rows[0][0] > _OLD_TRANSACTION:
            age, pid, name, state = rows[0]
            who = f"process {pid} of the server ({name or 'unnamed'}, {state})"
            text = f"{who} has had a transaction open for {age // 60:,} min: nothing can be cleaned up behind"
            text += " the drainers, and claims get slower"
            yield warning("vacuum", text, f"end it: SELECT pg_terminate_backend({pid})")

    def programs(self) -> Iterator[Finding]:
        """Say who delivers, and who did until lately."""
        living = 0
        for host, pid, since, alive, silent in self._rows(_DRAINERS):
            who = f"process {pid} on {host}"
            if alive:
                living += 1
                yield ok("drainer", f"{who} delivers, since {moment(since)}")
            elif silent < _STALE:
                text = f"{who} has not been heard of for {silent} s after its lease: others take over"
                yield warning("drainer", text, "look there: it was killed, is frozen, or is cut off")
        if not living:
            yield ok("drainer", "nobody delivers at the moment")

    def contents(self, now: int, known: Known) -> Iterator[Finding]:
        """Say what the tables hold, what Per refused, and what is pending and why."""
        known.legible, known.origin = True, self.origin()
        yield ok("outbox", f"of {known.origin or 'nobody yet'}, ID {self.outbox_id}")
        position = self.position()
        yield from refused(self._rows(_REFUSED))
        (answered,) = self._row(_ANSWERED)
        hold = position.hold
        backlog = Backlog(
            position.pending,
            None if position.oldest_pending is None else position.oldest_pending[1],
            None if hold is None else (hold.kind, hold.reason, hold.until, hold.wait_ms),
            answered,
        )
        yield from judge(backlog, now, known, drained=self.is_drained())
        (newest,) = self._row(_FUTURE)
        if newest is not None and newest > now + _SKEW_MS:
            text = f"an activity is dated {moment(newest)}, and now is {moment(now)}"
            yield problem("dates", text, "set the clocks of the hosts: ages are wrong, nothing else")
        (lost,) = self._row(_LOST)
        if lost:
            yield trail(lost)


def examine(url: DatabaseURL, now: int, known: Known) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Yield groups of findings, each with its title; raises :class:`~perqueue.OutboxError`."""
    with closing(Examination(url)) as examination:
        yield "Database", examination.server(now)
        yield "Programs", examination.programs()
        yield "Contents", examination.contents(now, known)
