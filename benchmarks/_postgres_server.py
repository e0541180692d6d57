"""A PostgreSQL server of the benchmark's own, its data in the temporary folder, and what it spends."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from perqueue._address import DatabaseURL
from perqueue._outbox.postgres.outbox import PostgresOutbox

if TYPE_CHECKING:
    from collections.abc import Iterator

sys.path.append(str(Path(__file__).parent.parent))
from tests.postgresql import Server, binaries

__all__ = ["GROUP", "KIND", "Measured", "binaries", "cpu", "options", "server"]

GROUP, KIND = "GROUP_A", "PREMIUM_DOWNLOAD"
_TICKS = os.sysconf("SC_CLK_TCK")
_SETTINGS = (
    "fsync=on",
    "shared_buffers=512MB",
    "max_wal_size=4GB",
    "shared_preload_libraries=pg_stat_statements",
    "pg_stat_statements.track_planning=on",
)
_BACKLOG = (
    "INSERT INTO perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
    " SELECT %s, 'USER_' || i, %s, extract(epoch FROM now()) * 1000 FROM generate_series(1, %s) i"
)
_HISTORY = (
    "INSERT INTO perqueue_settled SELECT nextval('perqueue_pending_id_seq'),"
    " %s, 'USER_' || i, %s, now, 1, now, 20, 1, '35434hjgghf46h34jh', NULL, NULL"
    " FROM generate_series(1, %s) i, (SELECT (extract(epoch FROM now()) * 1000)::bigint AS now) n"
)
_STATEMENTS = (
    "SELECT coalesce(sum(calls) FILTER (WHERE query ~ 'UPDATE perqueue_pending p SET owner'), 0)::int,"
    " coalesce(sum(calls) FILTER (WHERE query ~ 'WITH answer AS'), 0)::int,"
    " coalesce(sum(calls) FILTER (WHERE query ~ 'perqueue_'), 0)::int FROM pg_stat_statements"
)


@dataclass(frozen=True)
class Spent:
    """What has been done since the server started."""

    settled: int
    claims: int
    settles: int
    statements: int
    cpu: float
    """Seconds of all the server's processes."""


class Measured(Server):
    """A server with an outbox in it, that forces its log to the disk."""

    def __init__(self) -> None:
        super().__init__(_SETTINGS)
        PostgresOutbox(DatabaseURL(self.url), None).close()
        self.sql("CREATE EXTENSION pg_stat_statements")

    def spent(self) -> Spent:
        """Return it."""
        ((settled,),) = self.sql("SELECT sum(accepted) FROM perqueue_drainer")
        ((claims, settles, statements),) = self.sql(_STATEMENTS)
        assert self.process is not None
        return Spent(int(settled or 0), claims, settles, statements, cpu(self.process.pid, children=True))

    def fill(self, *, pending: int = 0, settled: int = 0) -> None:
        """Make it as if so many had been recorded, or delivered, the latter first."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(_HISTORY, (GROUP, KIND, settled))
            connection.execute(_BACKLOG, (GROUP, KIND, pending))
            connection.execute("VACUUM ANALYZE perqueue_settled, perqueue_pending")
            connection.execute("CHECKPOINT")


@contextmanager
def server() -> Iterator[Measured]:
    """Run a server."""
    running = Measured()
    try:
        yield running
    finally:
        running.close()


def cpu(process: int, *, children: bool = False) -> float:
    """Return the seconds of CPU that a process, and its children, have used; those that ended, too."""

    def used(number: int | str, fields: slice) -> float:
        try:
            stat = Path(f"/proc/{number}/stat").read_text(encoding="ascii")
        except OSError:  # it ended: its parent knows
            return 0.0
        return sum(map(int, stat.rpartition(")")[2].split()[fields])) / _TICKS

    if not children:
        return used(process, slice(11, 13))
    running = Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii").split()
    return used(process, slice(11, 15)) + sum(used(child, slice(11, 13)) for child in running)


def options(**more: Any) -> dict[str, Any]:
    """Return what every queue here has in common."""
    return {"activity_type_id": KIND, "activity_token": "token", **more}
