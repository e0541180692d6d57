"""Outboxes with millions of activities, made in minutes, and programs that are measured with one.

As a script: ``python _grown.py WHAT PATH [ARGUMENT]`` does one thing in an interpreter of its own and prints
what it measured as JSON.
"""

from __future__ import annotations

import json
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perqueue import FlushTimeout, PerQueue
from perqueue._activity import Event, Settlement, checksum
from perqueue._outbox import SQLiteOutbox
from perqueue._outbox.damage import settlement_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ORIGIN = "http://127.0.0.1:1"
GROUP, KIND = "G" * 30, "T" * 30
USERS = [f"USER_{number:025}" for number in range(1000)]
TRANSACTION = "35434hjgghf46h34jh"
_CHUNK = 1_000_000


def make(path: Path, pending: int, settled: int) -> None:
    """Make an outbox of 30-character IDs that holds so many activities, the settled ones first."""
    SQLiteOutbox(path, None).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        execute = connection.execute
        execute("PRAGMA journal_mode = OFF")
        execute("PRAGMA synchronous = OFF")
        execute("PRAGMA cache_size = -200000")
        execute("BEGIN")
        now = int(time.time() * 1000)
        rows = [(GROUP, user, KIND, now, checksum(GROUP, user, KIND, now)) for user in USERS]
        execute("CREATE TEMP TABLE sample (a, b, c, d, e)")
        connection.executemany("INSERT INTO sample VALUES (?, ?, ?, ?, ?)", rows)
        execute("CREATE TEMP TABLE times AS SELECT 1 FROM sample")
        for done in range(0, pending + settled, _CHUNK):
            execute(
                "INSERT INTO perqueue_activity (billing_id, user_id, activity_type_id, recorded_at, checksum)"
                " SELECT a, b, c, d, e FROM times, sample LIMIT ?",
                (min(_CHUNK, pending + settled - done),),
            )
        connection.create_function(
            "outcome", 1, lambda number: settlement_checksum(number, 1, now, TRANSACTION, None)
        )
        execute(
            "INSERT INTO perqueue_settlement"
            " (activity_id, state, settled_at, duration_ms, attempts, transaction_id, checksum)"
            " SELECT id, 1, ?, 20 + id % 200, 1, ?, outcome(id) FROM perqueue_activity WHERE id <= ?",
            (now, TRANSACTION, settled),
        )
        execute("UPDATE perqueue_drain SET accepted = ?, drained_through = ?", (settled, settled))
        execute("COMMIT")
        execute("PRAGMA journal_mode = WAL")


def accepted(activity: Any) -> Settlement:
    """Return what the drain settles when Per has accepted an activity."""
    return Settlement(
        activity=activity,
        event=Event.ACCEPT,
        answered_at=int(time.time() * 1000),
        duration_ms=20 + activity.id % 200,
        transaction_id=TRANSACTION,
    )


def deliver(outbox: SQLiteOutbox, count: int, in_flight: int = 32) -> None:
    """Settle pending activities as a drain does whose answers come in any order."""
    cursor = outbox.position().drained_through
    flying: list[Any] = []
    chance = random.Random(1)  # noqa: S311 - the same order in every run
    while count > 0:
        claimed = outbox.claim(cursor, 2 * in_flight - len(flying))
        cursor = claimed[-1].id if claimed else cursor
        flying += claimed
        chance.shuffle(flying)
        landed, flying = flying[:in_flight], flying[in_flight:]
        if not landed:
            return
        through = min((activity.id for activity in flying), default=cursor + 1) - 1
        outbox.settle([accepted(each) for each in landed], drained_through=through, refusals=(0, None))
        count -= len(landed)


@contextmanager
def server() -> Iterator[str]:
    """Run a local Per, and yield its URL."""
    program = [sys.executable, str(Path(__file__).with_name("_per.py"))]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


def _queue(path: Path, url: str = ORIGIN, **options: Any) -> PerQueue:
    token = "token"  # noqa: S105 - the server looks at none
    return PerQueue(path, activity_token=token, activity_type_id=KIND, base_url=url, **options)


def _adopt(path: Path, url: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE perqueue_outbox SET origin = ?", (url,))


def record(path: Path, count: int) -> dict[str, float]:
    """Record, and look at the statistics now and then."""
    with closing(_queue(path, drain=False, max_pending=10**9)) as queue:
        for number in range(count):
            queue.record(GROUP, USERS[number % 1000])
            if number % 100 == 0:
                queue.stats()
    return {}


def drain(path: Path, count: int) -> dict[str, float]:
    """Deliver some of what is pending, beside a program that records; say when the first one was through."""
    with server() as url:
        _adopt(path, url)
        began = time.perf_counter()
        with closing(_queue(path, url, max_pending=10**9)) as queue:
            queue.record(GROUP, USERS[0])
            first = queue.stats().delivered
            start = None
            while (delivered := queue.stats().delivered - first) < count and time.perf_counter() < began + 60:
                if delivered and start is None:
                    start = time.perf_counter() - began
                queue.record(GROUP, USERS[delivered % 1000])
                time.sleep(0.001)
            seconds = time.perf_counter() - began
        _adopt(path, ORIGIN)
    return {"first delivered ms": (start or seconds) * 1000}


def flush(path: Path, seconds: float) -> dict[str, float]:
    """Flush against a Per that does not answer; say by how much the deadline was passed, and who waited."""
    with closing(_queue(path, drain=False, max_pending=10**9)) as queue:
        queue.record(GROUP, USERS[0])
        worst = 0.0
        over = threading.Event()

        def beside() -> None:
            nonlocal worst
            while not over.is_set():
                began = time.perf_counter()
                queue.record(GROUP, USERS[0])
                worst = max(worst, time.perf_counter() - began)
                time.sleep(0.0005)

        thread = threading.Thread(target=beside)
        thread.start()
        began = time.perf_counter()
        with suppress(FlushTimeout):
            queue.flush(seconds)
        late = time.perf_counter() - began - seconds
        over.set()
        thread.join()
    return {"late ms": late * 1000, "worst record() ms": worst * 1000}


def command(path: Path, *arguments: str) -> dict[str, float]:
    """Run one of the commands that look at an outbox."""
    from perqueue.cli import main

    with redirect_stdout(StringIO()), suppress(SystemExit):
        main([*arguments, "--outbox", str(path)], standalone_mode=False)
    return {}


def main() -> None:
    """Do what the arguments say, and print what it took, with the most memory that this process ever had."""
    what, path = sys.argv[1], Path(sys.argv[2])
    argument = sys.argv[3] if len(sys.argv) > 3 else ""
    cases: dict[str, Callable[[], dict[str, float]]] = {
        "record": lambda: record(path, int(argument)),
        "drain": lambda: drain(path, int(argument)),
        "flush": lambda: flush(path, float(argument)),
        "command": lambda: command(path, *argument.split()),
    }
    began = time.perf_counter()
    figures = cases[what]()
    seconds = time.perf_counter() - began
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024
    print(json.dumps({**figures, "seconds": seconds, "peak MB": peak}))


if __name__ == "__main__":
    main()
