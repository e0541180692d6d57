"""A batch script: record every line of a CSV file, and end only when Per has it all.

    export PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
    python examples/batch_flush.py usage.csv        # with the columns billing_id and user_id

Exit codes: 0 Per has it all; 65 some lines cannot be recorded, or Per refused them; 75 not delivered in
time, but stored: the next run delivers it; 77 Per refuses the token. Running it again after any of them
is safe: in one reporting period Per counts a repeated user once.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

from perqueue import ActivityRejected, AuthenticationError, FlushTimeout, InvalidActivity, PerQueue


def record_file(queue: PerQueue, path: Path) -> int:
    """Record the file's lines; return how many of them could not be."""
    bad = 0
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            try:
                queue.record(billing_id=row.get("billing_id") or "", user_id=row.get("user_id") or "")
            except InvalidActivity as error:
                print(f"{path}, line {reader.line_num}: {error}", file=sys.stderr)
                bad += 1
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Record a CSV file's activities and deliver them.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds to wait for Per")
    arguments = parser.parse_args()

    queue = PerQueue(os.environ.get("PERQUEUE_OUTBOX", "batch_flush.db"))
    try:
        bad = record_file(queue, arguments.file)
        queue.flush(timeout=arguments.timeout)
    except ActivityRejected as error:
        print(error, file=sys.stderr)
        for activity in error.activities:
            print(f"refused: {activity.billing_id} {activity.user_id}: {activity.reason}", file=sys.stderr)
        return os.EX_DATAERR
    except AuthenticationError as error:
        print(error, file=sys.stderr)
        return os.EX_NOPERM
    except FlushTimeout as error:
        print(f"{error.pending} wait in the outbox: {error.reason}", file=sys.stderr)
        return os.EX_TEMPFAIL
    finally:
        queue.close()
    return os.EX_DATAERR if bad else os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
