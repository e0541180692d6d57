"""The statements of the hot paths, over the tables of :mod:`perqueue._outbox.schema`."""

APPEND = (
    "INSERT INTO perqueue_activity (billing_id, user_id, activity_type_id, recorded_at, checksum)"
    " VALUES (?, ?, ?, ?, ?)"
)
PENDING = (
    " FROM perqueue_activity a WHERE a.id > ?"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
)
COLUMNS = "a.id, a.billing_id, a.user_id, a.activity_type_id, a.recorded_at, a.checksum"
CLAIM = (
    f"SELECT {COLUMNS}, 0, NULL {PENDING}"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = a.id) ORDER BY a.id LIMIT ?"
)
CLAIM_DUE = (
    f"SELECT {COLUMNS}, r.attempts, r.reason FROM perqueue_retry r"
    " JOIN perqueue_activity a ON a.id = r.activity_id"
    " WHERE r.not_before <= ? OR r.not_before > ? ORDER BY r.not_before, r.activity_id LIMIT ?"
)
SETTLE = (
    "INSERT INTO perqueue_settlement"
    " (activity_id, state, settled_at, duration_ms, attempts, transaction_id, reason, rejection)"
    " SELECT ?, ?, ?, ?, 1 + (SELECT count(*) FROM perqueue_attempt WHERE activity_id = ?), ?, ?, ?"
    " WHERE true ON CONFLICT DO NOTHING"
)
LOG_ATTEMPT = (
    "INSERT INTO perqueue_attempt (activity_id, attempted_at, duration_ms, reason) VALUES (?, ?, ?, ?)"
)
DEFER = (
    "INSERT OR REPLACE INTO perqueue_retry (activity_id, attempts, not_before, reason) VALUES (?, ?, ?, ?)"
)
CLAIM_WAITING = (
    f"SELECT {COLUMNS}, r.attempts, r.reason FROM perqueue_retry r"
    " JOIN perqueue_activity a ON a.id = r.activity_id"
    " WHERE r.activity_id > ? ORDER BY r.activity_id LIMIT ?"
)
POSITION = (
    "SELECT drained_through, accepted, rejected, discarded, damaged, missing, rejections,"
    " refusal_streak, refusal_reason, hold, hold_reason, hold_until, holds, probe_requests, drainer_pid,"
    " (SELECT coalesce(max(id), 0) FROM perqueue_activity),"
    " (SELECT a.id FROM perqueue_activity a WHERE a.id > d.drained_through"
    " AND NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
    " ORDER BY a.id LIMIT 1),"
    " (SELECT min(activity_id) FROM perqueue_retry) FROM perqueue_drain d"
)
