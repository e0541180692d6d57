"""What an outbox in PostgreSQL costs: recording, delivering with one to eight drainers, and large tables.

Each case starts a server of its own (Debian: postgresql) in the temporary folder, with fsync on; it, the
local Per and the drainers share the machine. What is delivered is looked at for some seconds, after the
drainers have found their pace.
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import time
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING

import _postgres_tables
import _rounds
import psycopg
from _frame import HERE
from _postgres_server import GROUP, KIND, Measured, cpu, options, server
from drain import server as per
from record_shared import in_threads

from perqueue import PerQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    Call = Callable[[int], object]
    Peer = Callable[[Measured], AbstractContextManager[Call]]

DRAINERS = (1, 2, 4, 8)
BACKLOG = 150_000
_WARM_UP, _SECONDS = 1.5, 5.0
CALLS = 10_000
_SEVERAL = 8
INSERT = "bare INSERT, autocommit"
_APPEND = (
    "INSERT INTO perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
    " VALUES (%s, %s, %s, %s) RETURNING id"
)


# -- delivering


def drained(drainers: int, latency: float, _: Path, part: float) -> _rounds.Metrics:
    """Deliver a backlog with some drainers, each a process of its own."""
    with server() as database, per("--latency", latency) as fake, ExitStack() as running:
        assert fake.stdout is not None
        url = f"http://127.0.0.1:{fake.stdout.readline().strip()}"
        database.fill(pending=int(BACKLOG * max(part, 0.1)))
        command = [sys.executable, str(HERE / "postgres.py"), "--drainer", database.url, url]
        processes = [
            running.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE)) for _ in range(drainers)
        ]
        while not database.spent().settled:
            time.sleep(0.02)
        time.sleep(_WARM_UP * part)
        metrics = _over(_SECONDS * max(part, 0.1), database, [process.pid for process in processes])
        for process in processes:
            process.kill()
    return metrics


def _over(seconds: float, database: Measured, drainers: list[int]) -> _rounds.Metrics:
    used = -sum(map(cpu, drainers))
    began, before = time.perf_counter(), database.spent()
    time.sleep(seconds)
    took, after = time.perf_counter() - began, database.spent()
    used += sum(map(cpu, drainers))
    number = after.settled - before.settled
    if database.sql("SELECT count(*) FROM (SELECT FROM perqueue_pending LIMIT 1000) few") == [(0,)]:
        message = f"the backlog was too small: {number} in {took:.1f} s"
        raise RuntimeError(message)
    return {
        "delivered/s": number / took,
        "database's CPU, ms/1,000": (after.cpu - before.cpu) / number * 1e6,
        "drainers' CPU, ms/1,000": used / number * 1e6,
        "claims and settles/100": (after.claims + after.settles - before.claims - before.settles)
        / number
        * 100,
        "all statements/100": (after.statements - before.statements) / number * 100,
    }


def drain(database: str, base_url: str) -> None:
    """Be one of the drainers, until standard input ends."""
    with closing(PerQueue(database, base_url=base_url, **options())):
        sys.stdin.read()


# -- recording


@contextmanager
def bare(database: Measured, *, commits: bool = True) -> Iterator[Call]:
    """Insert by hand, each row committed at once or never, with a statement prepared once."""
    with psycopg.connect(database.url, autocommit=commits, prepare_threshold=0) as connection:
        cursor = connection.cursor()
        yield lambda number: cursor.execute(_APPEND, (GROUP, f"USER_{number}", KIND, number)).fetchone()


@contextmanager
def asking(database: Measured) -> Iterator[Call]:
    """Ask for nothing: a round trip."""
    with psycopg.connect(database.url, autocommit=True, prepare_threshold=0) as connection:
        cursor = connection.cursor()
        yield lambda _: cursor.execute("SELECT 1").fetchone()


def recorder(url: str) -> closing[PerQueue]:
    """Open a queue that only records."""
    return closing(PerQueue(url, **options(drain=False, base_url="http://127.0.0.1:9")))


@contextmanager
def recording(database: Measured, *, setting: str = "") -> Iterator[Call]:
    """Record with perqueue, which only records."""
    with recorder(f"{database.url}?options=-c{setting}" if setting else database.url) as queue:
        yield lambda number: queue.record(GROUP, f"USER_{number}")


@contextmanager
def recording_joined(database: Measured) -> Iterator[Call]:
    """Record in a transaction of one's own, and never commit."""
    with recorder(database.url) as queue, psycopg.connect(database.url) as mine:
        yield lambda number: queue.record(GROUP, f"USER_{number}", connection=mine)


@contextmanager
def beside(database: Measured) -> Iterator[Call]:
    """Record with perqueue, which delivers meanwhile, in the same process."""
    with per() as fake:
        assert fake.stdout is not None
        url = f"http://127.0.0.1:{fake.stdout.readline().strip()}"
        with closing(PerQueue(database.url, base_url=url, **options())) as queue:
            yield lambda number: queue.record(GROUP, f"USER_{number}")


def told(times: list[int], began: float) -> _rounds.Metrics:
    """Return percentiles, and how many calls a second there were since ``began``."""
    return {**_rounds.percentiles(times), "calls/s": len(times) / (time.perf_counter() - began)}


def one(peer: Peer, _: Path, part: float) -> _rounds.Metrics:
    """Call it from one thread."""
    with server() as database, peer(database) as call:
        began = time.perf_counter()
        times = _rounds.timed(call, int(CALLS * part), seconds=4)
        return told(times, began)


def several(peer: Peer, number: int, _: Path, part: float) -> _rounds.Metrics:
    """Call it from several threads: each its own connection, or all of them one queue."""
    with server() as database, ExitStack() as opened:
        each = number if peer is bare else 1
        calls = [opened.enter_context(peer(database)) for _ in range(each)]
        waiting = calls * (number // each)
        began = time.perf_counter()
        times = in_threads(
            number, lambda _: _rounds.timed(waiting.pop(), int(CALLS * part), seconds=4), calls[0]
        )
        return told(times, began)


def awaited(tasks: int, _: Path, part: float) -> _rounds.Metrics:
    """Await it in several tasks of one event loop."""
    calls, times = int(CALLS * part), []

    async def work(queue: PerQueue) -> None:
        for number in range(calls // tasks):
            began = time.perf_counter_ns()
            await queue.arecord(GROUP, f"USER_{number}")
            times.append(time.perf_counter_ns() - began)

    async def together(queue: PerQueue) -> None:
        await asyncio.gather(*(work(queue) for _ in range(tasks)))

    with server() as database, recorder(database.url) as queue:
        asyncio.run(queue.arecord(GROUP, "USER_0"))  # connected, as the others are
        began = time.perf_counter()
        asyncio.run(together(queue))
        return told(times, began)


def cases() -> Iterator[_rounds.Case]:
    """Yield all lines of the tables."""
    for latency in (0.0, 0.05):
        for drainers in DRAINERS:
            yield _rounds.Case(
                group=f"delivering, {latency * 1000:.0f} ms",
                name=f"{drainers} drainer{'s' * (drainers > 1)}",
                unit="",
                smoke=drainers == 2 and not latency,
                run=functools.partial(drained, drainers, latency),
            )
    group = "record()"
    no_wait = "perqueue record(), synchronous_commit=off"
    for name, run in (
        (INSERT, functools.partial(one, bare)),
        ("SELECT 1: the round trip", functools.partial(one, asking)),
        ("bare INSERT, not committed", functools.partial(one, functools.partial(bare, commits=False))),
        ("perqueue record(connection=), not committed", functools.partial(one, recording_joined)),
        ("perqueue record()", functools.partial(one, recording)),
        (
            no_wait,
            functools.partial(one, functools.partial(recording, setting="synchronous_commit%3Doff")),
        ),
        ("perqueue record(), beside its own drain", functools.partial(one, beside)),
        (f"{INSERT}, {_SEVERAL} threads, a connection each", functools.partial(several, bare, _SEVERAL)),
        (f"perqueue record(), {_SEVERAL} threads", functools.partial(several, recording, _SEVERAL)),
        (f"perqueue arecord(), {_SEVERAL} tasks", functools.partial(awaited, _SEVERAL)),
    ):
        smoke = name == INSERT or (name.startswith("perqueue") and name != no_wait)
        yield _rounds.Case(group=group, name=name, base=name == INSERT, smoke=smoke, run=run)
    yield from _postgres_tables.cases()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drainer"]:
        drain(*sys.argv[2:4])
    else:
        _rounds.main("postgres", "postgres.py", "What an outbox in PostgreSQL costs.", cases())
