"""The statements of the hot paths, over the tables of :mod:`perqueue._outbox.schema`."""

APPEND = (
    "INSERT INTO perqueue_activity (billing_id, user_id, activity_type_id, recorded_at, checksum)"
    " VALUES (?, ?, ?, ?, ?)"
)
PENDING = (
    " FROM perqueue_activity a WHERE a.id > ?"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
)
_FRESH = f"{PENDING} AND NOT EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = a.id)"
COLUMNS = "a.id, a.billing_id, a.user_id, a.activity_type_id, a.recorded_at, a.checksum"
CLAIM = f"SELECT {COLUMNS}, 0, NULL {_FRESH} ORDER BY a.id LIMIT ?"
# A wait without its activity is found, too: that one is damaged, and must not be pending for ever.
_WAITING_COLUMNS = COLUMNS.replace("a.id", "r.activity_id")
_CLAIM_DUE = (
    f"SELECT {_WAITING_COLUMNS}, r.attempts, r.reason FROM perqueue_retry r"
    " LEFT JOIN perqueue_activity a ON a.id = r.activity_id"
    " WHERE r.not_before {} ? ORDER BY r.not_before, r.activity_id LIMIT ?"
)
CLAIM_WAITING = (
    f"SELECT {_WAITING_COLUMNS}, r.attempts, r.reason FROM perqueue_retry r"
    " LEFT JOIN perqueue_activity a ON a.id = r.activity_id"
    " WHERE r.activity_id > ? ORDER BY r.activity_id LIMIT ?"
)
SETTLE = (
    "INSERT INTO perqueue_settlement"
    " (activity_id, state, settled_at, duration_ms, attempts, transaction_id, reason, rejection, checksum)"
    " SELECT ?, ?, ?, ?, 1 + (SELECT count(*) FROM perqueue_attempt WHERE activity_id = ?), ?, ?, ?, ?"
    " WHERE true ON CONFLICT DO NOTHING"
)
_ACCEPT = (
    # INSERT comes first: sqlite3 counts the rows of no statement that begins otherwise.
    "INSERT INTO perqueue_settlement"
    " (activity_id, state, settled_at, duration_ms, attempts, transaction_id, checksum)"
    " WITH answer (activity_id, settled_at, duration_ms, transaction_id, checksum, activity)"
    " AS (VALUES {rows})"
    " SELECT activity_id, 1, settled_at, duration_ms,"
    " 1 + (SELECT count(*) FROM perqueue_attempt t WHERE t.activity_id = answer.activity_id),"
    " transaction_id, answer.checksum FROM answer CROSS JOIN perqueue_activity a"
    " WHERE a.id = answer.activity_id AND a.checksum = answer.activity ON CONFLICT DO NOTHING"
)
_END_WAIT = (
    "DELETE FROM perqueue_retry WHERE activity_id IN ({ids})"
    " AND EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = perqueue_retry.activity_id)"
)
ACCEPT = {
    size: (
        _ACCEPT.format(rows=", ".join(["(?, ?, ?, ?, ?, ?)"] * size)),
        _END_WAIT.format(ids=", ".join("?" * size)),
    )
    for size in (64, 8, 1)
}
"""By how many at once, largest first: what settles accepted activities, and what ends their own waits.

Only of those that are still what was sent: after a restore from a backup a number may be another's.
"""
IS_THERE = "SELECT 1 FROM perqueue_activity WHERE id = ? AND checksum = ?"
SETTLED = (
    "SELECT activity_id, state, settled_at, transaction_id, reason, checksum FROM perqueue_settlement"
    " WHERE activity_id IN ({})"
)
OUTCOMES = (
    "SELECT activity_id, state, settled_at, transaction_id, reason, checksum FROM perqueue_settlement"
    " WHERE activity_id > ? AND activity_id <= ? ORDER BY activity_id LIMIT ?"
)
LAST_ID = "SELECT coalesce(max(id), 0) FROM perqueue_activity"
LOG_ATTEMPT = (
    "INSERT INTO perqueue_attempt (activity_id, attempted_at, duration_ms, reason) VALUES (?, ?, ?, ?)"
)
DEFER = (
    "INSERT OR REPLACE INTO perqueue_retry (activity_id, attempts, not_before, reason) VALUES (?, ?, ?, ?)"
)
REJECTED_SINCE = (
    f"SELECT {COLUMNS}, s.attempts, s.reason FROM perqueue_settlement s"
    " JOIN perqueue_activity a ON a.id = s.activity_id"
    " WHERE s.rejection > ? ORDER BY s.rejection LIMIT ?"
)
REFUSAL = (
    "SELECT activity_id, state, settled_at, transaction_id, reason, checksum, duration_ms"
    " FROM perqueue_settlement WHERE activity_id = ?"
)
OLDEST_FRESH = f"SELECT a.id {_FRESH} ORDER BY a.id LIMIT 1"
_POSITION = (
    "SELECT drained_through, accepted, rejected, discarded, damaged + missing, rejections, refusal_streak,"
    " holds, probe_requests, (SELECT coalesce(max(id), 0) FROM perqueue_activity), refusal_reason, hold,"
    " hold_reason, hold_until, hold_wait_ms, drainer_pid,"
    " in_flight, in_flight_limit, rate_limit, (SELECT min(activity_id) FROM perqueue_retry),"
    " ({oldest})"
    " FROM perqueue_drain d"
)
POSITION = _POSITION.format(
    oldest="SELECT a.id FROM perqueue_activity a WHERE a.id > d.drained_through"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
    " ORDER BY a.id LIMIT 1"
)
RECORDED_AT = "SELECT recorded_at FROM perqueue_activity WHERE id = ?"
COUNT_FRESH = f"SELECT count(*), max(id) FROM (SELECT a.id {_FRESH} AND a.id <= ? ORDER BY a.id LIMIT ?)"
COUNT_WAITING = (
    "SELECT count(*), max(activity_id) FROM (SELECT activity_id FROM perqueue_retry"
    " WHERE activity_id > ? AND activity_id <= ? ORDER BY activity_id LIMIT ?)"
)

# Past a part of perqueue_activity that cannot be read: IDs are given without gaps, and what is pruned
# lies far below, so the other tables say which of them are pending.
_UNSETTLED = (
    "WITH RECURSIVE each(id) AS ({first} UNION ALL"
    " SELECT id + 1 FROM each WHERE id < (SELECT max(id) FROM perqueue_activity))"
    " SELECT {columns} FROM each WHERE id <= (SELECT max(id) FROM perqueue_activity)"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = each.id)"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = each.id) LIMIT {limit}"
)
UNSETTLED = _UNSETTLED.format(first="SELECT ? + 1", columns="id, 0, NULL", limit="?")
POSITION_PAST_DAMAGE = _POSITION.format(
    oldest=_UNSETTLED.format(first="SELECT drained_through + 1 FROM perqueue_drain", columns="id", limit="1")
)
WAITING = (
    "SELECT activity_id, attempts, reason FROM perqueue_retry WHERE activity_id > ?"
    " ORDER BY activity_id LIMIT ?"
)
_WAITING_DUE = (
    "SELECT activity_id, attempts, reason FROM perqueue_retry WHERE not_before {} ?"
    " ORDER BY not_before, activity_id LIMIT ?"
)
# Two searches: one with OR would look at all that still wait to find the few whose time has come.
CLAIM_DUE = tuple((_CLAIM_DUE.format(sign), _WAITING_DUE.format(sign)) for sign in ("<=", ">"))
ONE = f"SELECT {COLUMNS} FROM perqueue_activity a WHERE a.id = ?"
