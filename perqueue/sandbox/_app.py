"""From an HTTP request to Per's rules and faults, and back."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perqueue.sandbox._delivery import Ending, deliver, end, whole
from perqueue.sandbox._ledger import Ledger, ReceivedActivity, RequestSeen
from perqueue.sandbox._wire import (
    ACTIVITIES_ADD,
    ENDPOINTS,
    accepted,
    bearer_token,
    parse_query,
    refused,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from perqueue.sandbox._aiohttp import web
    from perqueue.sandbox._fault_book import FaultBook
    from perqueue.sandbox._per import Per

_log = logging.getLogger("perqueue.sandbox")
_NOT_FOUND = refused("not_found", status=404)
_NOT_GET = refused("method_not_allowed", status=405)
_NOT_COUNTED = accepted("never-counted")


@dataclass(kw_only=True)
class App:
    """The handler of all requests."""

    per: Per
    ledger: Ledger
    faults: FaultBook
    latency: float
    control: Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse | None]]
    on_request: Callable[[RequestSeen], None] | None
    on_activity: Callable[[ReceivedActivity], None] | None

    def __post_init__(self) -> None:
        """Prepare what hanging requests wait for."""
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let all hanging requests go on; call it on the event loop."""
        self._released.set()
        self._released = asyncio.Event()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        path, _, query = request.raw_path.partition("?")
        endpoint = path.removeprefix("/")
        if endpoint not in ENDPOINTS:
            return await self.control(request, path) or whole(_NOT_FOUND)
        self.ledger.enter()
        try:
            outcome = await self._serve(request, endpoint, query)
        except ConnectionError:  # the client left in the middle of a long answer
            outcome = Ending.CLOSE
        finally:
            self.ledger.leave()
        if isinstance(outcome, Ending):
            # Only now: a client that sees the end may come again before this handler is cancelled.
            await end(request, outcome)
        return outcome

    async def _serve(self, request: web.BaseRequest, endpoint: str, raw: str) -> web.StreamResponse | Ending:
        # No await before the ledger is written: what arrived is never half recorded.
        now = self.per.clock()
        query = parse_query(raw)
        fault = self.faults.choose(endpoint, query or {})
        activity: ReceivedActivity | None = None
        token = bearer_token(request.headers.get("Authorization"))
        if request.method != "GET":
            answer = _NOT_GET
        elif endpoint != ACTIVITIES_ADD:
            answer = self.per.report(token, query, now)
        elif fault is None or fault.accept:
            answer, activity = self.per.add(token, query, now)
        else:
            answer = _NOT_COUNTED
        seen = RequestSeen(
            at=now,
            method=request.method,
            path=f"/{endpoint}",
            query=raw,
            headers=request.headers,
            fault=None if fault is None else fault.name,
            accepted=activity is not None,
        )
        self.ledger.log(seen, activity)
        self._tell(seen, activity)
        if self.latency > 0:
            await asyncio.sleep(self.latency)
        if fault is None:
            return whole(answer)
        return await deliver(request, fault, answer, self._hold)

    async def _hold(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._released.wait()
        except TimeoutError:
            pass

    def _tell(self, seen: RequestSeen, activity: ReceivedActivity | None) -> None:
        try:
            if self.on_request is not None:
                self.on_request(seen)
            if activity is not None and self.on_activity is not None:
                self.on_activity(activity)
        except Exception:  # noqa: BLE001  (whatever a callback raises, Per goes on answering)
            _log.exception("a callback of the sandbox failed")
