"""Print last week's usage: how many users each billing ID had, by activity type.

    export PER_REPORTING_TOKEN=...
    python examples/usage_report.py

The week ends now. What still waits in an outbox is not in it: flush() first where that matters.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta

from perqueue import PerClient, PerQueueError


def main() -> int:
    end = datetime.now(UTC)
    start = end - timedelta(days=7)
    try:
        with PerClient() as per:
            report = per.get_report(start, end)
    except PerQueueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1

    lines = [("BILLING ID", "ACTIVITY TYPE", "USERS")]
    rows = sorted(report.rows(), key=lambda row: (row.billing_id, row.activity_type_id))
    lines += [(row.billing_id, row.activity_type_id, str(row.unique)) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    print(f"{start:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC")
    for billing_id, activity_type_id, users in lines:
        print(f"{billing_id:{widths[0]}}  {activity_type_id:{widths[1]}}  {users:>{widths[2]}}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
