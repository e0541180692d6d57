"""Queues in virtual time: days of outages pass in milliseconds, in one thread, and always the same way.

The queues are real down to the SQLite file, the drain lock and httpx's requests. Only the event loop jumps
to its next timer instead of waiting for it, and every queue's worker is a task of that one loop.
"""

import asyncio
import itertools
import sqlite3
import types
from collections import deque
from contextlib import closing
from urllib.parse import parse_qsl

import httpx
import pytest

from perqueue._clock import Clock
from perqueue._delivery.worker import Worker

TOKEN = "a-good-token"
REQUEST_TIMEOUT = 2.0
RETRY_AFTER = 3
LATENCY = 0.001
MOST_TURNS = 20_000
"""Turns of the loop in which no virtual time passes."""


ROWS = """
    SELECT a.id, a.billing_id, a.user_id, a.activity_type_id, a.recorded_at,
           coalesce(s.state, 0), s.transaction_id, s.reason, r.activity_id IS NOT NULL
    FROM perqueue_activity a
    LEFT JOIN perqueue_settlement s ON s.activity_id = a.id
    LEFT JOIN perqueue_retry r ON r.activity_id = a.id
"""


def read(outbox):
    """Return all activities by ID, and the counters, as any other program would find them."""
    with closing(sqlite3.connect(outbox)) as reader:
        rows = {row[0]: row for row in reader.execute(ROWS)}
        reader.row_factory = sqlite3.Row
        return rows, dict(reader.execute("SELECT * FROM perqueue_drain").fetchone())


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock goes on only when there is nothing left to do."""

    def __init__(self):
        super().__init__()
        self.now = 1_000.0
        self._turns = 0

    def time(self):
        self.now += 1e-7  # no two things happen in the very same instant
        return self.now

    def _run_once(self):
        self._turns += 1
        assert self._turns < MOST_TURNS, "something spins instead of waiting"
        if not self._ready:
            timers = [timer.when() for timer in self._scheduled if not timer.cancelled()]
            assert timers, "everybody waits, and nothing will ever happen"
            if min(timers) > self.now:
                self._turns = 0
                self.now = min(timers)
        super()._run_once()


class World:
    """Virtual time, and what leads queues into it for as long as the world lasts."""

    def __init__(self, wall):
        self.loop = VirtualLoop()
        self.wall = wall
        self._patches = pytest.MonkeyPatch()
        clock = Clock(wall=lambda: self.wall + self.loop.now, monotonic=self.loop.time)
        self._patches.setattr("perqueue._recorder.SYSTEM_CLOCK", clock)
        self._patches.setattr("perqueue._flush.time", types.SimpleNamespace(monotonic=self.loop.time))
        self._patches.setattr("perqueue._delivery.worker.Worker", self._worker)

    def _worker(self, *arguments, **options):
        return VirtualWorker(self.loop, *arguments, **options)

    def run(self, awaitable):
        """Return what comes of a coroutine."""
        return self.loop.run_until_complete(awaitable)

    def result(self, receipt):
        """Return what comes of a receipt."""

        async def wait():
            return await receipt

        return self.run(wait())

    def wait(self, seconds):
        """Let virtual seconds pass."""
        self.run(asyncio.sleep(seconds))

    def close(self):
        self._patches.undo()
        self.loop.close()


class VirtualWorker(Worker):
    """A worker that is a task of a loop, not a thread."""

    def __init__(self, loop, *arguments, **options):
        super().__init__(*arguments, **options)
        self._virtual = loop
        self._task = None

    def start(self):
        if not self.started and not self._stopping:
            self.started = True
            self._loop = self._virtual
            self._task = self._virtual.create_task(self._main(self._new_lock()))

    def stop(self, grace):
        super().stop(grace)
        if self._task is not None:
            self._virtual.run_until_complete(self._task)


class Line:
    """One process's way to Per, cut when that process is killed."""

    def __init__(self, per):
        self._per = per
        self.cut = False
        self.transport = httpx.MockTransport(self._handle)

    async def _handle(self, request):
        if self.cut:
            raise httpx.ConnectError("the process is gone")
        response = await self._per.handle(request)
        if self.cut:
            raise httpx.ReadError("the process is gone")
        if response.status_code == 429:
            self._per.has_asked_to_wait()
        return response


class FakePer:
    """Per at the other end of some lines; it behaves as it is told, and writes down what it did.

    An activity is known by its user ID. What must not come is added to ``wrong``.
    """

    def __init__(self, loop):
        self._loop = loop
        self._numbers = itertools.count(1)
        self.script = deque()
        self.mode = "ok"
        self.healed = False
        self.requests = 0
        self.accepted = {}  # user -> transaction IDs
        self.told = set()  # transaction IDs whose answer has left
        self.refused = {}  # user -> reasons
        self.recorded = {}  # user -> what must come: billing ID, activity type
        self.settled = set()  # users whom the outbox calls accepted
        self.unsure = set()  # users whose answer may have been lost with its process
        self.throttled_at = self.quiet_until = float("-inf")
        self.wrong = []

    def heal(self):
        """From now on, accept everything at once."""
        self.healed = True
        self.script.clear()
        self.mode = "ok"

    def has_asked_to_wait(self):
        """Take it that somebody has heard of `Retry-After`."""
        self.throttled_at = self._loop.now
        self.quiet_until = self.throttled_at + RETRY_AFTER

    async def handle(self, request):
        self.requests += 1
        query = dict(parse_qsl(request.url.query.decode(), keep_blank_values=True))
        user = query["userId"]
        self._check(user, (query["billingId"], query["activityTypeId"]))
        mode = self.script.popleft() if self.script else self.mode
        if not self.healed:
            mode = {"REFUSED": "refuse", "BROKEN": "broken"}.get(query["activityTypeId"], mode)
        return await getattr(self, f"_{mode}")(user)

    def _check(self, user, parts):
        if self.recorded.get(user) != parts:
            self.wrong.append(f"{user!r} was sent as {parts}, not {self.recorded.get(user)}")
        if user in self.settled:
            self.wrong.append(f"{user!r} was sent although its acceptance is stored")
        if user not in self.unsure and self.told.intersection(self.accepted.get(user, ())):
            self.wrong.append(f"{user!r} was sent although the drain knew its acceptance")
        # What left in the same instant as the answer that asks to wait could not know.
        if (
            self.throttled_at < self._loop.now < self.quiet_until - 0.01
        ):  # times are stored in whole milliseconds
            self.wrong.append(f"{user!r} was sent {self.quiet_until - self._loop.now:.3f} s too early")

    # What the modes do

    def _accept(self, user):
        transaction = f"T{next(self._numbers)}"
        self.accepted.setdefault(user, []).append(transaction)
        return transaction

    async def _ok(self, user):
        return await self._tell(self._accept(user))

    async def _tell(self, transaction):
        await asyncio.sleep(LATENCY)
        self.told.add(transaction)
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": transaction}})

    async def _slow(self, user):
        transaction = self._accept(user)
        await asyncio.sleep(REQUEST_TIMEOUT / 4)
        return await self._tell(transaction)

    async def _late(self, user):
        transaction = self._accept(user)
        await asyncio.sleep(2 * REQUEST_TIMEOUT)
        return await self._tell(transaction)

    async def _lost(self, user):
        self._accept(user)
        raise httpx.ReadError("reset")

    async def _half(self, user):
        self._accept(user)
        return httpx.Response(200, content=b'{"ok": true, "result": {"transac')

    async def _hang(self, _):
        await asyncio.sleep(2 * REQUEST_TIMEOUT)

    async def _down(self, _):
        raise httpx.ConnectError("refused")

    async def _broken(self, _):
        return httpx.Response(500, text="something broke")

    async def _html(self, _):
        return httpx.Response(200, text="<html>Please log in</html>")

    async def _bad_token(self, _):
        return httpx.Response(401, json={"ok": False, "message": "invalid_auth_token"})

    async def _refuse(self, user):
        self.refused.setdefault(user, set()).add("unknown activity type")
        return httpx.Response(200, json={"ok": False, "message": "unknown activity type"})

    async def _dislike(self, user):
        self.refused.setdefault(user, set()).add("no such company")
        return httpx.Response(400, json={"ok": False, "error": "no such company"})

    async def _throttle(self, _):
        await asyncio.sleep(LATENCY)
        return httpx.Response(429, headers={"Retry-After": str(RETRY_AFTER)})


MODES = sorted(
    {"ok", "slow", "late", "lost", "half", "hang", "down", "broken", "html", "bad_token"}
    | {"refuse", "dislike", "throttle"}
)
