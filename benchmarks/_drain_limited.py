"""_drain_limited.py URL NUMBER SECONDS: record so many activities and drain them for so long."""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from perqueue import FlushTimeout, PerQueue


def main(url: str, number: int, seconds: float) -> None:
    """Drain, and print what is left."""
    with tempfile.TemporaryDirectory() as folder:
        outbox = Path(folder, "activities.db")
        queue = PerQueue(outbox, activity_token="token", activity_type_id="TYPE", base_url=url)  # noqa: S106 - nobody looks
        for each in range(number):
            queue.record("GROUP_A", f"USER_{each}")
        with suppress(FlushTimeout):
            queue.flush(seconds)
        print(json.dumps(queue.stats().pending))
        queue.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
