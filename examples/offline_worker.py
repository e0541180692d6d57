"""A worker that may be cut off for days: it records whatever happens, and delivers when there is a network.

    export PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
    echo GROUP_A USER_1 | python examples/offline_worker.py

Each line of its input is an event: a billing ID, a blank, a user ID. End of input ends it. Whatever
Per does not have by then, or when the machine is switched off, waits in the outbox for the next start.
"""

from __future__ import annotations

import logging
import os
import sys

from perqueue import FlushTimeout, InvalidActivity, PerQueue, PerQueueError, Stats


def stalled(stats: Stats) -> None:
    """Say once that nothing has been delivered for a while; a real one might switch on a lamp."""
    print(f"{stats.pending} waiting: {stats.reason}", flush=True)


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    queue = PerQueue(
        os.environ.get("PERQUEUE_OUTBOX", "offline_worker.db"),
        durability="power",  # somebody may pull the plug: sync before record() returns
        on_stalled=stalled,
        stalled_after=3600,
    )
    try:
        print(f"started with {queue.stats().pending} waiting", flush=True)
        for line in sys.stdin:
            billing_id, _, user_id = line.strip().partition(" ")
            try:
                receipt = queue.record(billing_id, user_id)
            except InvalidActivity as error:
                print(f"skipped a line: {error}", flush=True)
                continue
            print(f"recorded {receipt.id}", flush=True)
        try:
            queue.flush(timeout=float(os.environ.get("FLUSH_SECONDS", "10")))
        except FlushTimeout as error:
            print(f"{error.pending} wait for the next start: {error.reason}", flush=True)
        except PerQueueError as error:  # a refused token or activity: kept, and for somebody to look at
            print(error, file=sys.stderr, flush=True)
            return 1
        else:
            print("Per has it all", flush=True)
        return 0
    finally:
        queue.close()


if __name__ == "__main__":
    sys.exit(main())
