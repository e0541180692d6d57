"""What it costs to record in the application's own transaction, beside a plain INSERT of the same row in it.

python benchmarks/_joined.py: a minute or less. Both go into each transaction, in turn first and second.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import sys
import tempfile
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django import setup
from django.conf import settings
from django.db import connection as django
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from perqueue import PerQueue

if TYPE_CHECKING:
    from collections.abc import Callable

TRANSACTIONS = 200 if "--smoke" in sys.argv else 5000
VALUES = ("GROUP_A", "USER_1", "LOGIN", 1_700_000_000_000, 2_345_678_901)
PLAIN = (
    "INSERT INTO plain (billing_id, user_id, activity_type_id, recorded_at, checksum) VALUES (?, ?, ?, ?, ?)"
)
TABLE = (
    "CREATE TABLE plain (id INTEGER PRIMARY KEY, billing_id TEXT NOT NULL, user_id TEXT NOT NULL,"
    " activity_type_id TEXT NOT NULL, recorded_at INTEGER NOT NULL, checksum INTEGER NOT NULL)"
)


def measure(
    name: str, plain: Callable[[], object], joined: Callable[[], object], commit: Callable[[], object]
) -> None:
    """Print medians and 99th percentiles, in microseconds."""
    times: dict[str, list[float]] = {"plain": [], "joined": []}
    pair = [("plain", plain), ("joined", joined)]
    for _ in range(TRANSACTIONS):
        pair.reverse()
        for what, call in pair:
            began = time.perf_counter()
            call()
            times[what].append((time.perf_counter() - began) * 1e6)
        commit()
    plain_50, joined_50 = (statistics.median(times[what]) for what in ("plain", "joined"))
    plain_99, joined_99 = (sorted(times[what])[int(0.99 * TRANSACTIONS)] for what in ("plain", "joined"))
    print(f"| {name} | {plain_50:.0f} | {joined_50:.0f} | {plain_99:.0f} | {joined_99:.0f} |")


def run(path: Path) -> None:
    """Measure each library on one file."""
    options: dict[str, Any] = {"embedded": True, "drain": False, "activity_type_id": "LOGIN"}
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(TABLE)

        def joins(queue: PerQueue, where: object) -> Callable[[], object]:
            return lambda: queue.record("GROUP_A", "USER_1", connection=where)

        print("| µs | plain INSERT, p50 | joined, p50 | plain INSERT, p99 | joined, p99 |")
        print("|---|--:|--:|--:|--:|")
        with PerQueue(path, **options) as queue:
            plain = lambda: connection.execute(PLAIN, VALUES)  # noqa: E731
            measure("sqlite3", plain, joins(queue, connection), connection.commit)
            with Session(create_engine(f"sqlite:///{path}")) as session:
                measure(
                    "SQLAlchemy's Session",
                    lambda: session.connection().exec_driver_sql(PLAIN, VALUES),
                    joins(queue, session),
                    session.commit,
                )
            database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(path)}
            settings.configure(DATABASES={"default": database})
            setup()
            django.set_autocommit(False)
            django_plain = PLAIN.replace("?", "%s")
            measure(
                "Django",
                lambda: django.cursor().execute(django_plain, VALUES),
                joins(queue, django),
                django.commit,
            )
            django.close()
        with PerQueue(path, coalesce=timedelta(days=1), **options) as queue:
            measure("sqlite3, coalesced", plain, joins(queue, connection), connection.commit)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR", "/var/tmp")) as folder:  # noqa: S108 - a disk
        run(Path(folder, "app.db"))
