"""A fleet in virtual time: the real drain of every host, against a modelled Per, in one event loop.

Drain, judge, feed, settler and pace are perqueue's own. Modelled are what they are handed: an outbox that
counts instead of storing, a request that takes as long and ends as the modelled Per decides, and a clock that
jumps to whatever happens next.
"""

from __future__ import annotations

import asyncio
import logging
import random
import selectors
from collections import Counter
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, cast

from perqueue import RetryPolicy
from perqueue._activity import Activity, Event, Outcome, Verdict
from perqueue._clock import Clock
from perqueue._complaints import Complaints
from perqueue._delivery import drain
from perqueue._delivery.pace import Pace
from perqueue._outbox import Load, News, Position

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from perqueue._activity import Settlement
    from perqueue._outbox import Hold, Outbox

TIMEOUT = 10.0
"""Seconds after which a host gives a request up: perqueue's default."""
_CAUGHT_UP = 3.0
"""Seconds of recording that may be pending in a host that has caught up."""
_BEFORE = 20.0
"""Seconds of a normal day before the outage."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fleet, its Per, and an outage."""

    hosts: int
    recorded: float
    """Activities a second, of all hosts together."""
    takes: float
    """Requests a second that Per takes, of all hosts together."""
    overload: str
    """What Per does beyond that: "waits" (the queue grows), "503", "429" or "429, Retry-After"."""
    outage: float = 3600.0
    """Seconds for which activities have piled up when Per is back,"""
    shown: float = 300.0
    """of which so many at the end are played."""
    latency: float = 0.05
    policy: RetryPolicy = field(default_factory=RetryPolicy)

    @property
    def backlog(self) -> float:
        """What has piled up in all hosts together."""
        return self.recorded * self.outage

    @property
    def at_best(self) -> float:
        """Seconds to catch up in, if Per is never idle."""
        return self.backlog / (self.takes - self.recorded)


class Jumping(selectors.DefaultSelector):
    """Waits for nothing: it is later already."""

    now = 1_000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        """Let the time pass that somebody would have waited."""
        assert timeout is not None, "everybody waits, and nothing will ever happen"
        self.now += timeout
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer."""

    def __init__(self) -> None:
        self.jumping = Jumping()
        super().__init__(self.jumping)

    def time(self) -> float:
        """Return the virtual time, which never stands still: what is due in no time would be due for ever."""
        self.jumping.now += 1e-7
        return self.jumping.now


class Per:
    """Takes so many requests a second, from all hosts together."""

    def __init__(self, case: Case, loop: VirtualLoop) -> None:
        self._case = case
        self._loop = loop
        self._free_at = self._filled_at = loop.time()
        self._tokens = self._burst = case.takes
        self.is_down = False
        self.in_flight = self.most_in_flight = 0
        self.came: Counter[int] = Counter()
        """Requests that came, by the second of virtual time."""
        self.taken: Counter[int] = Counter()
        """Requests that counted, likewise."""

    async def add(self, _: Activity) -> Outcome:
        """Answer one request."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.came[int(self._loop.time())] += 1
        wait, outcome = self._decide()
        try:
            if wait < TIMEOUT:
                await asyncio.sleep(wait)
                return outcome
            await asyncio.sleep(TIMEOUT)
            return Outcome(verdict=Verdict.NO_ANSWER, reason="timeout")
        finally:
            self.in_flight -= 1

    def _decide(self) -> tuple[float, Outcome]:
        latency = self._case.latency
        if self.is_down:
            return latency, Outcome(verdict=Verdict.NO_ANSWER, reason="HTTP 503", status=503)
        now = self._loop.time()
        if self._case.overload.startswith("429"):
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._case.takes)
            self._filled_at = now
            if self._tokens < 1:
                asks = 1.0 if "Retry-After" in self._case.overload else None
                refused = Outcome(
                    verdict=Verdict.RATE_LIMITED, reason="HTTP 429", retry_after=asks, status=429
                )
                return latency, refused
            self._tokens -= 1
        else:
            queued = max(0.0, self._free_at - now)
            if self._case.overload == "503" and queued > 1.0:
                return latency, Outcome(verdict=Verdict.NO_ANSWER, reason="HTTP 503", status=503)
            self._free_at = now + queued + 1 / self._case.takes
            latency += queued
        self.taken[int(now)] += 1
        return latency, Outcome(verdict=Verdict.ACCEPTED, transaction_id="T", status=200)


class Counting:
    """An outbox of nothing but numbers: activities are recorded steadily, and all at once."""

    shared = False
    claim_batch, settle_batch, settle_delay, follow_interval = 1, 64, 0.01, 0.05
    lost: Collection[int] = ()
    epoch = 0

    def __init__(self, rate: float, clock: Clock) -> None:
        self._rate = rate
        self._clock = clock
        self._since = clock.monotonic() + random.random() / rate  # noqa: S311 - not all in the same instant
        self._waiting: list[tuple[int, int, Activity]] = []  # a heap: until when, ID
        self.piled_up = 0
        self.accepted = 0

    @property
    def last_id(self) -> int:
        """The number of activities recorded so far."""
        return self.piled_up + max(0, int((self._clock.monotonic() - self._since) * self._rate))

    @property
    def pending(self) -> int:
        """The number of those that are not accepted yet."""
        return self.last_id - self.accepted

    def claim(self, after: int, limit: int) -> list[Activity]:
        """Return what was recorded after an ID."""
        last = min(after + limit, self.last_id)
        return [
            Activity(id=each, billing_id="B", user_id="U", activity_type_id="T", recorded_at=0)
            for each in range(after + 1, last + 1)
        ]

    def claim_due(self, now: int, _: int, limit: int, __: object) -> list[Activity]:
        """Return those whose wait is over."""
        due: list[Activity] = []
        while self._waiting and self._waiting[0][0] <= now and len(due) < limit:
            due.append(heappop(self._waiting)[2])
        return due

    def next_due(self) -> int | None:
        """Return when the first wait is over."""
        return self._waiting[0][0] if self._waiting else None

    def settle(self, settlements: Sequence[Settlement], **_: object) -> Hold | None:
        """Count what was accepted, and keep what has to wait."""
        for settlement in settlements:
            activity = settlement.activity
            if settlement.event is Event.ACCEPT:
                self.accepted += 1
            elif settlement.not_before is not None:
                again = replace(activity, attempts=activity.attempts + 1)
                heappush(self._waiting, (settlement.not_before, activity.id, again))
        return None

    def position(self) -> Position:
        """Return what a drain begins with."""
        nothing: dict[str, Any] = dict.fromkeys(Position._fields, 0)
        nothing |= {"refusal_reason": None, "hold": None, "drainer_pid": None, "oldest_pending": None}
        return Position(**nothing | {"last_id": self.last_id, "load": Load(), "counted": None})

    def change_counter(self) -> int:
        """Return a number that differs when something was recorded."""
        return self.last_id

    def news(self) -> News:
        """Return that nobody else did anything."""
        return News(0, None)

    def holds_lease(self) -> bool:
        """Tell that no other may drain it."""
        return True

    take_probe = holds_lease

    def _nothing(self, *_: object) -> None:
        return None

    set_hold = set_drainer = keep_lease = prune = expire = stay_awake = _nothing


class Silent:
    """An observer for whom nobody waits."""

    def _nothing(self, *_: object) -> None:
        return None

    on_settled = on_hold = on_tick = awaited = _nothing


class Host:
    """One host: its outbox and the drain of it."""

    def __init__(self, case: Case, per: Per, clock: Clock) -> None:
        self.outbox = Counting(case.recorded / case.hosts, clock)
        self.pace = Pace(case.policy, 32, TIMEOUT, clock.monotonic)
        self.caught_up: float | None = None
        """When what had piled up was delivered."""
        self.drain = drain.Drain(
            cast("Outbox", self.outbox),
            per.add,
            Silent(),
            self.pace,
            Complaints(clock.monotonic),
            policy=case.policy,
            keep_delivered_ms=1,
            clock=clock,
        )


@dataclass(kw_only=True)
class Course:
    """What happened, counted from the moment at which Per is back."""

    before: list[int]
    """Requests that came in each second of the outage, as far as it was played."""
    came: list[int]
    """Requests that came in each second since then."""
    taken: list[int]
    """Requests that counted in each second since then."""
    caught_up: list[float]
    """Seconds until each host had delivered what had piled up."""
    unfinished: int
    """Hosts that had not when the time was up."""
    sent_twice: int
    """Requests that counted, and whose answer was not waited for any more."""
    most_in_flight: int
    pending: list[int]
    """Pending in all hosts together, in each second since then."""


async def _play(case: Case, loop: VirtualLoop, longest: float) -> Course:
    clock = Clock(wall=lambda: loop.time() + 1e9, monotonic=loop.time)
    per = Per(case, loop)
    hosts = [Host(case, per, clock) for _ in range(case.hosts)]
    running = [loop.create_task(host.drain.run()) for host in hosts]
    await asyncio.sleep(_BEFORE)
    down_at = loop.time()
    per.is_down = True
    for host in hosts:
        host.outbox.piled_up = round((case.outage - case.shown) * case.recorded / case.hosts)
    await asyncio.sleep(case.shown)
    per.is_down = False
    per.most_in_flight = per.in_flight
    back_at = loop.time()
    few = max(5.0, _CAUGHT_UP * case.recorded / case.hosts)
    pending = []
    while loop.time() < back_at + longest and any(host.caught_up is None for host in hosts):
        pending.append(sum(host.outbox.pending for host in hosts))
        await asyncio.sleep(1)
        for host in hosts:
            if host.caught_up is None and host.outbox.pending <= few:
                host.caught_up = loop.time() - back_at
    course = Course(
        before=[per.came[second] for second in range(int(down_at), int(back_at))],
        came=[per.came[int(back_at) + second] for second in range(len(pending))],
        taken=[per.taken[int(back_at) + second] for second in range(len(pending))],
        caught_up=sorted(host.caught_up for host in hosts if host.caught_up is not None),
        unfinished=sum(host.caught_up is None for host in hosts),
        sent_twice=0,
        most_in_flight=per.most_in_flight,
        pending=pending,
    )
    for host in hosts:
        host.drain.stop(TIMEOUT)
    await asyncio.gather(*running)
    course.sent_twice = sum(per.taken.values()) - sum(host.outbox.accepted for host in hosts)
    return course


def play(case: Case, longest: float, seed: int = 1) -> Course:
    """Play a case, for at most so many seconds after Per is back."""
    random.seed(seed)
    log = logging.getLogger("perqueue")
    before = log.level, drain.TICK
    log.setLevel(logging.CRITICAL)
    drain.TICK = 1.0  # what is recorded is noticed a second late: a thousand hosts would do little else
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(_play(case, loop, longest))
    finally:
        loop.close()
        drain.TICK = before[1]
        log.setLevel(before[0])
