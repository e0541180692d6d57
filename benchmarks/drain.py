"""What delivering costs: perqueue end to end beside one shared ``httpx.AsyncClient``, in one run.

Each case delivers the same activities to a local server in a process of its own, with as many requests in
flight. perqueue's cost includes claiming, parsing and settling; httpx's only the requests. Run it with
``make bench``; the ratios to the first line are the figures that matter.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from perqueue import PerQueue, _parser

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Measured = tuple[float, float]

ACTIVITIES = 4_000
IN_FLIGHT = 32
LATENCIES = (0.0, 0.05)
TOKEN = "token"  # noqa: S105 - the server looks at none


@contextmanager
def server(latency: float) -> Iterator[str]:
    """Run a local Per that answers after a latency, and yield its URL."""
    program = [sys.executable, str(Path(__file__).with_name("_per.py")), str(latency)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        assert process.stdout is not None  # noqa: S101 - for the type checker
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.terminate()


def shared_client(url: str) -> Measured:
    """Send the requests over one ``httpx.AsyncClient`` whose pool is as large as need be."""

    async def main() -> Measured:
        limits = httpx.Limits(max_connections=IN_FLIGHT, max_keepalive_connections=IN_FLIGHT)
        numbers = iter(range(ACTIVITIES))
        async with httpx.AsyncClient(limits=limits, trust_env=False) as client:

            async def lane() -> None:
                for number in numbers:
                    ids = {"billingId": "GROUP_A", "userId": f"USER_{number}", "activityTypeId": "TYPE"}
                    headers = {"Authorization": f"Bearer {TOKEN}"}
                    response = await client.get(f"{url}/activities.add", params=ids, headers=headers)
                    response.json()

            began, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*(lane() for _ in range(IN_FLIGHT)))
            return time.perf_counter() - began, time.process_time() - cpu

    return asyncio.run(main())


def perqueue_with(parser: type[_parser.Parser]) -> Callable[[str], Measured]:
    """Return a case in which perqueue delivers an outbox with one of the HTTP parsers."""

    def deliver(url: str) -> Measured:
        _parser._choice = parser  # noqa: SLF001 - both in one run
        with tempfile.TemporaryDirectory() as folder:
            outbox = Path(folder, "activities.db")
            options = {"activity_token": TOKEN, "activity_type_id": "TYPE", "base_url": url}
            with PerQueue(outbox, drain=False, **options) as queue:  # type: ignore[arg-type]
                for number in range(ACTIVITIES):
                    queue.record("GROUP_A", f"USER_{number}")
            began, cpu = time.perf_counter(), time.process_time()
            with PerQueue(outbox, max_in_flight=IN_FLIGHT, **options) as queue:  # type: ignore[arg-type]
                queue.flush(600)
                return time.perf_counter() - began, time.process_time() - cpu

    return deliver


def main() -> None:
    """Print requests a second and CPU per activity of each case, and their ratios to the first."""
    cases: dict[str, Callable[[str], Measured]] = {
        "one shared httpx.AsyncClient": shared_client,
        "perqueue, h11": perqueue_with(_parser.H11Parser),
    }
    try:
        _parser.HttptoolsParser()
        cases["perqueue, httptools"] = perqueue_with(_parser.HttptoolsParser)
    except ImportError:
        print("perqueue, httptools: not installed (the extra `fast`)")
    print(f"{ACTIVITIES:,} activities, {IN_FLIGHT} in flight        /s     ratio   µs CPU     ratio")
    for latency in LATENCIES:
        first: tuple[float, float] | None = None
        with server(latency) as url:
            for name, case in cases.items():
                seconds, cpu = case(url)
                rate, cost = ACTIVITIES / seconds, cpu / ACTIVITIES * 1e6
                first = first or (rate, cost)
                text = f"{name}, server at {latency * 1000:.0f} ms"
                print(f"{text:<44}{rate:6.0f}{rate / first[0]:9.1f}{cost:9.0f}{first[1] / cost:9.1f}")


if __name__ == "__main__":
    main()
