"""What ``coalesce=`` makes of many records of few users: one request for each of them.

The last lines record a million times, of ten thousand users in random order, deliver to a local server, and
count its requests.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import _peers
import _rounds
from drain import server

from perqueue import PerQueue

if TYPE_CHECKING:
    from pathlib import Path

CALLS, USERS, RECORDS = 20_000, 10_000, 1_000_000
WINDOW = timedelta(hours=24)


def repeated(folder: Path, part: float, *, users: int = 100) -> _rounds.Metrics:
    """Record what has been recorded."""
    ids = [f"USER_{number}" for number in range(users)]
    path = folder / "perqueue.db"
    with contextlib.closing(
        PerQueue(
            path, coalesce=WINDOW, drain=False, activity_type_id=_peers.TYPE, base_url="http://127.0.0.1:9"
        )
    ) as queue:
        for user_id in ids:
            queue.record(_peers.GROUP, user_id)
        times = _rounds.timed(lambda n: queue.record(_peers.GROUP, ids[n % users]), int(CALLS * part))
    return _rounds.percentiles(times)


def plain(folder: Path, part: float, **options: object) -> _rounds.Metrics:
    """Record each activity for itself, with coalescing or without."""
    with _peers.perqueue(folder, **options) as call:
        return _rounds.percentiles(_rounds.timed(call, int(CALLS * part)))


def million(folder: Path, part: float) -> _rounds.Metrics:
    """Record often, deliver, and count the requests."""
    users, records = int(USERS * part), int(RECORDS * part)
    ids = [f"USER_{number}" for number in range(users)]
    chosen = ids + random.Random(1).choices(ids, k=records - users)  # noqa: S311 - no secret
    random.Random(2).shuffle(chosen)  # noqa: S311
    with server("--limit", 1e9) as process:  # it counts only where it limits
        assert process.stdin is not None
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        began = time.perf_counter()
        with PerQueue(
            folder / "perqueue.db",
            coalesce=WINDOW,
            activity_token="token",  # noqa: S106 - the server looks at none
            activity_type_id=_peers.TYPE,
            base_url=url,
        ) as queue:
            for user_id in chosen:
                queue.record(_peers.GROUP, user_id)
            recorded = time.perf_counter() - began
            queue.flush(600)
        delivered = time.perf_counter() - began
        process.stdin.close()
        requests = sum(taken + refused for taken, refused in json.loads(process.stdout.readline()))
    if requests != users:
        message = f"{requests} requests for {users} users"
        raise RuntimeError(message)
    return {"recorded": recorded, "delivered": delivered, "requests": requests, "records": records}


if __name__ == "__main__":
    one, many = "one record()", f"{RECORDS:,} records of {USERS:,} users"
    _rounds.main(
        "record_coalescing",
        "record_coalescing.py",
        "What coalescing saves.",
        [
            _rounds.Case(group=one, name="of a key that is known", survives=_peers.KILL, run=repeated),
            _rounds.Case(
                group=one,
                name="of a new key",
                survives=_peers.KILL,
                run=functools.partial(plain, coalesce=WINDOW),
            ),
            _rounds.Case(group=one, name="without coalescing", survives=_peers.KILL, base=True, run=plain),
            _rounds.Case(group=many, name="coalesced", unit="s", survives=_peers.KILL, run=million),
        ],
    )
