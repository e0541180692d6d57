"""One recording process of the demo: records in small bursts, and acknowledges what is recorded.

Its standard input is one line of JSON, then a line that says go, and a last one that says end. Its
standard output is "ready", a line for each activity whose ``record()`` has returned (its number in the
list, and how long the call took), and "done". Each line is one write to the pipe, so that it is there
even if the process is killed next.
"""

import json
import os
import sys
import threading
import time

from perqueue import PerQueue, RetryPolicy

_STDOUT = 1
_BURST = 10


def main() -> None:
    """Record what standard input says, and deliver until it says end."""
    orders = json.loads(sys.stdin.readline())
    activities: list[list[str]] = orders["activities"]
    lanes, lost = orders["threads"], orders["lose"]
    queue = PerQueue(orders["outbox"], drain=True, retry=RetryPolicy(cap=orders["retry_cap"]))
    os.write(_STDOUT, b"ready\n")
    sys.stdin.readline()
    began = time.monotonic()
    interval = orders["seconds"] / max(1, len(activities))

    def run(lane: int) -> None:
        for number in range(lane, len(activities), lanes):
            wait = began + number * interval - time.monotonic()
            if wait > 0 and number // lanes % _BURST == 0:
                time.sleep(wait)
            billing_id, user_id = activities[number]
            before = time.perf_counter_ns()
            if number != lost:
                queue.record(billing_id, user_id)
            took = time.perf_counter_ns() - before
            os.write(_STDOUT, b"%d %d\n" % (number, took))

    threads = [threading.Thread(target=run, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(_STDOUT, b"done\n")
    sys.stdin.readline()
    queue.close()


if __name__ == "__main__":
    main()
