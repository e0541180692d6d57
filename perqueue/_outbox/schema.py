"""The tables of an outbox file, and the migrations that bring an older file up to date.

The file is part of the interface: people open it with sqlite-utils or Datasette. What they want to
read is the view ``perqueue_activity_log``; times in the tables are milliseconds since the epoch.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from sqlite_utils import Database, Migrations

from perqueue._outbox.connection import SCHEMA_VERSION

if TYPE_CHECKING:
    import sqlite3

# What record() appends to: an integer key and no index, so that one insert touches one page. Rows are
# never updated when they are settled (growing rows in full pages would split every page), which is why
# outcomes have a table of their own, filled in nearly the same order.
_ACTIVITY = """
CREATE TABLE perqueue_activity (
    id INTEGER PRIMARY KEY,
    billing_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    activity_type_id TEXT NOT NULL,
    recorded_at INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) STRICT
"""

# One row for each activity that is no longer pending. rejection numbers the rejected ones in the order
# of Per's refusals, so that a flush finds those since the one before it. The checksum keeps a damaged
# row from being taken for an outcome.
_SETTLEMENT = """
CREATE TABLE perqueue_settlement (
    activity_id INTEGER PRIMARY KEY,
    state INTEGER NOT NULL CHECK (state BETWEEN 1 AND 4),
    settled_at INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    transaction_id TEXT,
    reason TEXT,
    rejection INTEGER,
    checksum INTEGER NOT NULL
) STRICT
"""

_REJECTION_INDEX = """
CREATE UNIQUE INDEX perqueue_settlement_rejection
ON perqueue_settlement (rejection) WHERE rejection IS NOT NULL
"""

# Every request that brought no acceptance: when, how long, why.
_ATTEMPT = """
CREATE TABLE perqueue_attempt (
    id INTEGER PRIMARY KEY,
    activity_id INTEGER NOT NULL,
    attempted_at INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    reason TEXT NOT NULL
) STRICT
"""

# Pending activities that wait on their own account: each failed while others got through, or was
# requeued. All other pending ones lie above perqueue_drain.drained_through.
_RETRY = """
CREATE TABLE perqueue_retry (
    activity_id INTEGER PRIMARY KEY,
    attempts INTEGER NOT NULL,
    not_before INTEGER NOT NULL,
    reason TEXT
) STRICT
"""

# One row: the counters that make stats() O(1), the watermark, and why the drain waits. damaged counts
# rows that are not what was recorded, missing those that a salvage did not find at all.
_DRAIN = """
CREATE TABLE perqueue_drain (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    drained_through INTEGER NOT NULL DEFAULT 0,
    accepted INTEGER NOT NULL DEFAULT 0,
    rejected INTEGER NOT NULL DEFAULT 0,
    discarded INTEGER NOT NULL DEFAULT 0,
    damaged INTEGER NOT NULL DEFAULT 0,
    missing INTEGER NOT NULL DEFAULT 0,
    pruned INTEGER NOT NULL DEFAULT 0,
    rejections INTEGER NOT NULL DEFAULT 0,
    refusal_streak INTEGER NOT NULL DEFAULT 0,
    refusal_reason TEXT,
    hold TEXT CHECK (hold IN ('backing_off', 'retry_after', 'bad_token', 'refused')),
    hold_reason TEXT,
    hold_until INTEGER,
    hold_wait_ms INTEGER,
    holds INTEGER NOT NULL DEFAULT 0,
    probe_requests INTEGER NOT NULL DEFAULT 0,
    drainer_pid INTEGER
) STRICT
"""

# With coalesce: the activity that stands for all others of its key in a window.
_COALESCED = """
CREATE TABLE perqueue_coalesced (
    window_end INTEGER NOT NULL,
    window_start INTEGER NOT NULL,
    billing_id TEXT NOT NULL,
    user_id TEXT NOT NULL,
    activity_type_id TEXT NOT NULL,
    activity_id INTEGER NOT NULL,
    PRIMARY KEY (window_end, window_start, billing_id, user_id, activity_type_id)
) STRICT, WITHOUT ROWID
"""

_OUTBOX = """
CREATE TABLE perqueue_outbox (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    outbox_id TEXT NOT NULL,
    schema_version INTEGER NOT NULL,
    origin TEXT,
    created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ'))
) STRICT
"""

_LOG = """
CREATE VIEW perqueue_activity_log AS
SELECT
    a.id,
    a.billing_id,
    a.user_id,
    a.activity_type_id,
    CASE coalesce(s.state, 0)
        WHEN 0 THEN 'pending' WHEN 1 THEN 'accepted' WHEN 2 THEN 'rejected'
        WHEN 3 THEN 'discarded' ELSE 'damaged'
    END AS state,
    strftime('%Y-%m-%dT%H:%M:%fZ', a.recorded_at / 1000.0, 'unixepoch') AS recorded_at,
    strftime('%Y-%m-%dT%H:%M:%fZ', s.settled_at / 1000.0, 'unixepoch') AS settled_at,
    coalesce(
        s.attempts, (SELECT count(*) FROM perqueue_attempt t WHERE t.activity_id = a.id)
    ) AS attempts,
    s.transaction_id,
    CASE WHEN s.activity_id IS NULL THEN (
        SELECT t.reason FROM perqueue_attempt t WHERE t.activity_id = a.id ORDER BY t.id DESC LIMIT 1
    ) ELSE s.reason END AS reason
FROM perqueue_activity a LEFT JOIN perqueue_settlement s ON s.activity_id = a.id
"""


_HOLDING = (
    "perqueue_outbox",
    "perqueue_activity",
    "perqueue_settlement",
    "perqueue_attempt",
    "perqueue_retry",
)
"""Tables that are empty only if nothing is known of any activity."""


class _OutboxMigrations(Migrations):
    migrations_table = "perqueue_migrations"


migrations = _OutboxMigrations("perqueue")


@migrations()
def create_outbox(db: Database) -> None:
    """Create every table of the first released schema."""
    tables = (_ACTIVITY, _SETTLEMENT, _ATTEMPT, _RETRY, _DRAIN, _COALESCED, _OUTBOX)
    for statement in (*tables, _REJECTION_INDEX, _LOG):
        db.execute(statement)
    db.execute("CREATE INDEX perqueue_attempt_activity ON perqueue_attempt (activity_id)")
    db.execute("CREATE INDEX perqueue_retry_due ON perqueue_retry (not_before, activity_id)")
    db.execute("INSERT INTO perqueue_drain (id) VALUES (1)")
    db.execute(
        "INSERT INTO perqueue_outbox (id, outbox_id, schema_version) VALUES (1, ?, 0)", [str(uuid.uuid4())]
    )


@migrations()
def remember_what_was_pruned(db: Database) -> None:
    """Store how far back the audit trail reaches: when the latest of the pruned activities was settled."""
    db.execute("ALTER TABLE perqueue_drain ADD COLUMN trail_lost_through INTEGER NOT NULL DEFAULT 0")
    # What was pruned before this was known may have been settled at any time.
    db.execute(
        "UPDATE perqueue_drain SET trail_lost_through = (strftime('%s') + 1) * 1000"
        " WHERE pruned + missing > 0"
    )


@migrations()
def show_how_busy_the_drainer_is(db: Database) -> None:
    """Store what only the process that drains knows, for those that look from outside."""
    for column in (
        "in_flight INTEGER NOT NULL DEFAULT 0",
        "in_flight_limit INTEGER NOT NULL DEFAULT 0",
        "rate_limit REAL",
    ):
        db.execute(f"ALTER TABLE perqueue_drain ADD COLUMN {column}")


def drop_remains(connection: sqlite3.Connection) -> None:
    """Make room if the application has dropped or emptied perqueue's tables, so that nothing is in them."""
    query = "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view')"
    kinds = {name: kind for name, kind in connection.execute(query) if name.startswith("perqueue_")}
    for name in _HOLDING:
        if name in kinds and connection.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone():  # noqa: S608
            return
    for name, kind in kinds.items():
        connection.execute(f"DROP {kind} {name}")


def migrate(connection: sqlite3.Connection, origin: str | None) -> None:
    """Apply what is missing; the caller holds the setup lock. A new outbox belongs to ``origin``."""
    db = Database(connection, recursive_triggers=False, execute_plugins=False)
    migrations.apply(db)
    with db.atomic():
        db.execute("UPDATE perqueue_outbox SET schema_version = ? WHERE id = 1", [SCHEMA_VERSION])
        db.execute("UPDATE perqueue_outbox SET origin = ? WHERE id = 1 AND origin IS NULL", [origin])
