"""Which request meets which fault."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from perqueue.sandbox._bad_answers import RateLimit, RateLimited
from perqueue.sandbox._fault import Fault
from perqueue.sandbox._wire import ENDPOINTS, Query


class ActivityParameters(NamedTuple):
    """What a request to `activities.add` asks for; an absent parameter is an empty string."""

    billing_id: str
    user_id: str
    activity_type_id: str


When = Callable[[ActivityParameters], bool]


class _Limiter:
    """A bucket of `burst` tokens that gains `per_second` of them."""

    def __init__(self, limit: RateLimit, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._burst = float(limit.burst or math.ceil(limit.per_second))
        self._tokens = self._burst
        self._now = now
        self._at = now()

    def check(self) -> RateLimited | None:
        """Take a token; without one, say what the request gets instead."""
        now = self._now()
        rate = self._limit.per_second
        self._tokens = min(self._burst, self._tokens + (now - self._at) * rate)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return None
        wait = math.ceil((1 - self._tokens) / rate)
        return RateLimited(wait if self._limit.retry_after else None)


@dataclass(kw_only=True, eq=False)
class _Plan:
    fault: Fault
    endpoints: frozenset[str]
    times: int | None
    when: When | None
    served: int = 0
    limiter: _Limiter | None = field(init=False)

    def __post_init__(self) -> None:
        self.limiter = _Limiter(self.fault) if isinstance(self.fault, RateLimit) else None

    def hit(self, endpoint: str, parameters: ActivityParameters) -> Fault | None:
        if endpoint not in self.endpoints or (self.when is not None and not self.when(parameters)):
            return None
        fault = self.fault if self.limiter is None else self.limiter.check()
        self.served += fault is not None
        return fault


class FaultBook:
    """Faults in force; safe to use from any thread."""

    def __init__(self) -> None:
        """Start without faults."""
        self.renew_lock()
        self._special: list[_Plan] = []  # with a predicate
        self._counted: list[_Plan] = []  # for so many requests, one plan after the other
        self._standing: dict[str, _Plan] = {}  # until cleared, one for each endpoint

    def renew_lock(self) -> None:
        """Replace the lock: a forked child may have inherited it locked."""
        self._lock = threading.RLock()

    def add(self, fault: Fault, *, times: int | None, when: When | None, endpoint: str) -> None:
        """Put a fault in force, as `Sandbox.set_fault()` promises."""
        endpoints = ENDPOINTS if endpoint == "both" else ENDPOINTS & {endpoint}
        if not endpoints:
            raise ValueError(f"endpoint must be one of {[*sorted(ENDPOINTS), 'both']}, not {endpoint!r}")
        if when is not None and "reports.get" in endpoints:
            raise ValueError("when matches activities only: a report has no billing ID, user ID or type")
        if times is not None and times < 1:
            raise ValueError(f"times must be at least 1, not {times}")
        plan = _Plan(fault=fault, endpoints=endpoints, times=times, when=when)
        with self._lock:
            if when is not None:
                self._special.append(plan)
            elif times is not None:
                self._counted.append(plan)
            else:
                self._standing |= dict.fromkeys(endpoints, plan)

    def clear(self) -> None:
        """End all faults."""
        with self._lock:
            self._special.clear()
            self._counted.clear()
            self._standing.clear()

    def choose(self, endpoint: str, query: Query) -> Fault | None:
        """Return the fault that this request meets, and count it."""
        if not (self._special or self._counted or self._standing):
            return None
        names = ("billingId", "userId", "activityTypeId")
        parameters = ActivityParameters(*(query.get(name, [""])[0] for name in names))
        with self._lock:
            for plan in self._plans():
                fault = plan.hit(endpoint, parameters)
                if fault is not None:
                    self._drop_if_spent(plan)
                    return fault
        return None

    def describe(self) -> list[Mapping[str, Any]]:
        """Return the faults in force as JSON-able mappings, in the order in which they are tried."""
        with self._lock:
            plans = list(dict.fromkeys(self._plans()))
        return [
            {
                "name": plan.fault.name,
                "parameters": asdict(plan.fault),
                "times": None if plan.times is None else plan.times - plan.served,
                "served": plan.served,
                "endpoints": sorted(plan.endpoints),
                "conditional": plan.when is not None,
            }
            for plan in plans
        ]

    def _plans(self) -> Iterator[_Plan]:
        yield from tuple(self._special)
        yield from tuple(self._counted)
        yield from tuple(self._standing.values())

    def _drop_if_spent(self, plan: _Plan) -> None:
        if plan.times is not None and plan.served >= plan.times:
            for plans in (self._special, self._counted):
                if plan in plans:
                    plans.remove(plan)
