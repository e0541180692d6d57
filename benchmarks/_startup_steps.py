"""_startup_steps.py imports | calls OUTBOX [drain]: time a program's first steps, and print them in JSON.

It imports nothing else before it has measured: what was loaded already would cost perqueue nothing.
"""

import sys
import time


def imports() -> dict[str, float]:
    """Return the milliseconds of each import, when those before it are done."""
    stamps = [time.perf_counter()]
    import sqlite3  # noqa: F401

    stamps.append(time.perf_counter())
    import perqueue  # noqa: F401

    stamps.append(time.perf_counter())
    import httpx  # noqa: F401

    stamps.append(time.perf_counter())
    names = ["import sqlite3", "import perqueue, beyond that", "import httpx, beyond that"]
    return _steps(names, stamps)


def calls(outbox: str, *, drain: bool) -> dict[str, float]:
    """Return the milliseconds of the constructor and of the first two calls of ``record()``."""
    from perqueue import PerQueue

    stamps = [time.perf_counter()]
    queue = PerQueue(
        outbox,
        drain=drain,
        base_url="http://127.0.0.1:9",  # nobody listens there
        activity_token="token",  # noqa: S106 - nobody looks at it
        activity_type_id="TYPE",
        exit_timeout=0.1,
    )
    stamps.append(time.perf_counter())
    for number in range(2):
        queue.record("GROUP_A", f"USER_{number}")
        stamps.append(time.perf_counter())
    queue.close()
    return _steps(["PerQueue(…)", "the first record()", "the second record()"], stamps)


def _steps(names: list[str], stamps: list[float]) -> dict[str, float]:
    return {name: (stamps[at + 1] - stamps[at]) * 1000 for at, name in enumerate(names)}


if __name__ == "__main__":
    steps = imports() if sys.argv[1] == "imports" else calls(sys.argv[2], drain=sys.argv[3:] == ["drain"])
    import json

    print(json.dumps(steps))
