"""_fleet_host.py URL RATE OUTBOX: a host that records so many activities a second and delivers them.

It hears on its standard input how many more to record at once, and then "back": from that moment it counts
the seconds until what has piled up is delivered, and says them.
"""

from __future__ import annotations

import json
import sys
import threading
import time

from perqueue import PerQueue


def main(url: str, rate: float, outbox: str) -> None:
    """Record and deliver until what had piled up has gone."""
    host = f"HOST_{outbox.rpartition('/')[2]}"
    queue = PerQueue(outbox, activity_token="sandbox-activity-token", activity_type_id="TYPE", base_url=url)  # noqa: S106 - the sandbox's
    over = threading.Event()

    def record(thread: str, seconds: float) -> None:
        number = 0
        while not over.wait(seconds):
            queue.record(host, f"{thread}_{number}")
            number += 1

    recorder = threading.Thread(target=record, args=("STEADY", 1 / rate))
    recorder.start()
    print("ready", flush=True)
    for number in range(int(sys.stdin.readline())):
        queue.record(host, f"PILED_{number}")
    sys.stdin.readline()
    began = time.monotonic()
    while queue.stats().pending > max(5.0, 3 * rate):
        time.sleep(0.05)
    print(json.dumps(time.monotonic() - began), flush=True)
    sys.stdin.readline()
    over.set()
    recorder.join()
    queue.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
