"""The ways to send one request for each activity; each is run in a process of its own by drain.py.

A case prepares what is no part of the sending (clients' TLS contexts, recorded activities) and returns
what is measured. Everything waits for each answer and parses its JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import ssl
import sys
import tempfile
import threading
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import httpx

TOKEN = "token"  # noqa: S105 - the server looks at none
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
WARM_UP = 200
"""Activities sent before anything is measured, so that imports and caches are not part of it."""


@dataclass(frozen=True)
class Job:
    """What is to be sent, and where to."""

    url: str
    number: int
    in_flight: int
    context: ssl.SSLContext

    def path(self, number: int) -> str:
        """Return what one request asks for."""
        return f"/activities.add?billingId=GROUP_A&userId=USER_{number}&activityTypeId=TYPE"


def _need(module: str) -> Any:
    return importlib.import_module(module)


async def _lanes(job: Job, ask: Callable[[str], Awaitable[object]]) -> None:
    """Send everything with as many requests in flight as wanted."""
    numbers = iter(range(job.number))

    async def lane() -> None:
        for number in numbers:
            await ask(job.path(number))

    await asyncio.gather(*(lane() for _ in range(job.in_flight)))


def _limits(job: Job) -> httpx.Limits:
    import httpx

    return httpx.Limits(max_connections=job.in_flight, max_keepalive_connections=job.in_flight)


def _over(job: Job, make: Callable[[], httpx.AsyncClient]) -> Callable[[], None]:
    async def main() -> None:
        async with make() as client:

            async def ask(path: str) -> None:
                (await client.get(job.url + path, headers=HEADERS)).json()

            await _lanes(job, ask)

    return lambda: asyncio.run(main())


def shared(job: Job) -> Callable[[], None]:
    """One ``httpx.AsyncClient`` whose pool is as large as need be."""
    import httpx

    return _over(
        job, lambda: httpx.AsyncClient(limits=_limits(job), trust_env=False, verify=job.context, timeout=60)
    )


def http2(job: Job) -> Callable[[], None]:
    """The same over one HTTP/2 connection."""
    import httpx

    _need("h2")
    return _over(job, lambda: httpx.AsyncClient(http1=False, http2=True, trust_env=False, timeout=60))


def over_aiohttp(job: Job) -> Callable[[], None]:
    """``httpx.AsyncClient`` over the transport of httpx-aiohttp."""
    import httpx

    transport = _need("httpx_aiohttp").AiohttpTransport
    return _over(
        job,
        lambda: httpx.AsyncClient(
            transport=transport(verify=job.context, limits=_limits(job), trust_env=False), trust_env=False
        ),
    )


def client_a_task(job: Job) -> Callable[[], None]:
    """One ``httpx.AsyncClient`` for each task, over one TLS context."""
    import httpx

    async def main() -> None:
        numbers = iter(range(job.number))

        async def lane(client: httpx.AsyncClient) -> None:
            for number in numbers:
                (await client.get(job.url + job.path(number), headers=HEADERS)).json()

        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(httpx.AsyncClient(trust_env=False, verify=job.context))
                for _ in range(job.in_flight)
            ]
            await asyncio.gather(*map(lane, clients))

    return lambda: asyncio.run(main())


def _threads(job: Job, count: int) -> Callable[[], None]:
    import httpx

    def run() -> None:
        numbers = iter(range(job.number))
        lock = threading.Lock()
        with httpx.Client(limits=_limits(job), trust_env=False, verify=job.context) as client:

            def lane() -> None:
                while True:
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    client.get(job.url + job.path(number), headers=HEADERS).json()

            threads = [threading.Thread(target=lane) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    return run


def one_thread(job: Job) -> Callable[[], None]:
    """``httpx.Client``, one request after the other."""
    return _threads(job, 1)


def many_threads(job: Job) -> Callable[[], None]:
    """One ``httpx.Client`` for as many threads as requests in flight."""
    return _threads(job, job.in_flight)


def with_aiohttp(job: Job) -> Callable[[], None]:
    """The client of aiohttp itself."""
    aiohttp = _need("aiohttp")

    async def main() -> None:
        connector = aiohttp.TCPConnector(limit=job.in_flight, ssl=job.context)
        async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:

            async def ask(path: str) -> None:
                async with session.get(job.url + path) as response:
                    await response.json()

            await _lanes(job, ask)

    return lambda: asyncio.run(main())


def bare_streams(job: Job) -> Callable[[], None]:
    """Streams of asyncio and no HTTP library: the floor."""
    base = urlsplit(job.url)
    tls = job.context if base.scheme == "https" else None
    headers = f"Host: {base.netloc}\r\nAuthorization: Bearer {TOKEN}"

    async def main() -> None:
        numbers = iter(range(job.number))

        async def lane() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", base.port, ssl=tls)
            for number in numbers:
                writer.write(f"GET {job.path(number)} HTTP/1.1\r\n{headers}\r\n\r\n".encode())
                answer = await reader.readuntil(b"\r\n\r\n")
                length = int(answer.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
                json.loads(await reader.readexactly(length))
            writer.transport.abort()

        await asyncio.gather(*(lane() for _ in range(job.in_flight)))

    return lambda: asyncio.run(main())


def _perqueue(job: Job, transport: Callable[[], Any] | None = None) -> Callable[[], None]:
    from perqueue import PerQueue

    folder = tempfile.TemporaryDirectory()
    outbox = Path(folder.name, "activities.db")
    common: dict[str, Any] = {"activity_token": TOKEN, "activity_type_id": "TYPE", "base_url": job.url}
    with PerQueue(outbox, drain=False, **common) as queue:
        for number in range(job.number):
            queue.record("GROUP_A", f"USER_{number}")

    def run() -> None:
        more = {"verify": job.context} if transport is None else {"transport": transport()}
        with folder, PerQueue(outbox, max_in_flight=job.in_flight, **common, **more) as queue:
            queue.flush(300)

    return run


def perqueue_h11(job: Job) -> Callable[[], None]:
    """Perqueue with its core dependencies."""
    sys.modules["httptools"] = None  # type: ignore[assignment]  # as if it were not installed
    return _perqueue(job)


def perqueue_httptools(job: Job) -> Callable[[], None]:
    """Perqueue with the extra ``fast``."""
    _need("httptools")
    return _perqueue(job)


def perqueue_httpx(job: Job) -> Callable[[], None]:
    """Perqueue over httpx's own transport, as with a proxy."""
    import httpx

    return _perqueue(job, lambda: httpx.AsyncHTTPTransport(verify=job.context, trust_env=False))


CASES: dict[str, Callable[[Job], Callable[[], None]]] = {
    "httpx.AsyncClient, shared": shared,
    "httpx.AsyncClient, one a task": client_a_task,
    "httpx.Client, 1 thread": one_thread,
    "httpx.Client, a thread each": many_threads,
    "httpx.AsyncClient, HTTP/2": http2,
    "httpx.AsyncClient over httpx-aiohttp": over_aiohttp,
    "aiohttp": with_aiohttp,
    "bare asyncio streams": bare_streams,
    "bare asyncio streams, one at a time": bare_streams,
    "perqueue over httpx's transport": perqueue_httpx,
    "perqueue": perqueue_h11,
    "perqueue[fast]": perqueue_httptools,
}


def main() -> None:
    """Run one case and print what it took, in JSON; or which package it lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--url", required=True)
    parser.add_argument("--number", type=int, required=True)
    parser.add_argument("--in-flight", type=int, required=True)
    parser.add_argument("--authority", help="PEM file: whose certificates are trusted")
    options = parser.parse_args()
    context = ssl.create_default_context(cafile=options.authority)
    job = Job(options.url, options.number, options.in_flight, context)
    try:
        CASES[options.case](replace(job, number=min(WARM_UP, job.number)))()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("perqueue"):
            raise  # no peer: what is measured here is broken
        print(json.dumps({"missing": error.name}))
        return
    run = CASES[options.case](job)
    began, cpu = time.perf_counter(), time.process_time()
    run()
    print(json.dumps({"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
