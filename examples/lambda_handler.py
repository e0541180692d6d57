"""AWS Lambda, and whatever else freezes a process between two calls: deliver before the answer.

After the handler has returned nothing runs: a background thread is frozen until the next call, which may
never come, and /tmp goes with the environment. So the handler flushes at its end.

    export PERQUEUE_OUTBOX=/tmp/activities.db PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
"""

from __future__ import annotations

from typing import Any

from perqueue import PerQueue

queue = PerQueue()  # once for each environment, when it starts


def handler(event: dict[str, Any], context: Any) -> dict[str, int]:
    """Do something for a user, and count it.

    What cannot be delivered in time is an error, so that the caller (a queue, a retry) sends the event again:
    repeated, it changes no bill.
    """
    queue.record(billing_id=event["company"], user_id=event["user"])
    left = context.get_remaining_time_in_millis() / 1000
    queue.flush(timeout=max(0.0, left - 0.5))
    return {"statusCode": 200}
