"""When to send, and how much: backoff, probe, ramp, ``Retry-After`` and pauses, in one place.

In an outage the gate closes for a wait that grows with full jitter; then one request, the probe, may
pass. Anything that Per answers opens the gate. The number in flight doubles in each round trip until
something goes wrong, and grows by one a round trip from then on, unless answers take seconds; single failures
and rising latency shrink it by a tenth (additive increase, multiplicative decrease). The drain's thread alone
uses a controller; no method blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tenacity import RetryCallState, Retrying, wait_random_exponential

from perqueue._delivery.rate import RateCap
from perqueue._stats import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._settings import RetryPolicy

PROBE_INTERVAL = 60.0
"""Seconds between probes while everything is refused, and the longest between two tries of a bad token."""
_PROBE_SPACING = 0.1
"""Seconds between two probes, however many callers of flush() ask."""
_SHRINK = 0.9
_SLOW, _SLOWER = 2.0, 0.1
"""Latency has risen when it is over twice the lowest, and 0.1 s: then more in flight does not help."""
_CROWDED = 0.4
"""Latency beyond which more is not tried, whatever was the lowest, as a part of a request's deadline: where a
thousand hosts wait in one queue, it is what they made it, and an answer after the deadline is lost."""
_SMOOTHING = 1 / 16
_LATENCY_MEMORY = 60.0
"""Seconds after which the lowest latency is measured anew: routes change."""


def jittered(base: float, cap: float, failures: int) -> float:
    """Return the seconds to wait after the n-th failure in a row: full jitter, exponential, capped."""
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = max(1, failures)
    return wait_random_exponential(multiplier=base, max=cap)(state)


class Pace:
    """Decides, from what came of the requests so far, how many may be in flight now."""

    def __init__(
        self,
        policy: RetryPolicy,
        max_in_flight: int,
        request_timeout: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._max = max_in_flight
        self._crowded = _CROWDED * request_timeout
        self._monotonic = monotonic
        self._limit = 1.0
        self._threshold = float(max_in_flight)  # doubling ends here
        self._shrunk_at = float("-inf")
        self._lowest = float("inf")
        self._lowest_at = float("-inf")
        self._latency = 0.0
        self._cap = RateCap(monotonic)
        self._opens_at = self._asked_until = self._last_probe = float("-inf")
        self.failures = 0
        """Rounds in a row in which nothing got through."""
        self.closed_at = float("-inf")
        """When the gate was closed last, by the monotonic clock."""
        self.gate: Gate | None = None
        """Why the gate is closed, or was before the probe that is under way; None while requests flow."""
        self.reason: str | None = None
        """What was wrong, in words."""

    @property
    def limit(self) -> int:
        """How many requests may be in flight while they flow."""
        return int(self._limit)

    @property
    def rate(self) -> float | None:
        """How many requests may be sent in a second; None: Per has not asked for fewer."""
        return self._cap.rate

    def allowance(self) -> int:
        """Return how many requests may be in flight now: 0 while waiting, 1 for a probe."""
        if self.gate is None:
            return int(self._limit)
        return 1 if self._monotonic() >= self._opens_at else 0

    def wait(self) -> float:
        """Return the seconds until the gate lets a probe pass; 0 if it is open."""
        return 0.0 if self.gate is None else max(0.0, self._opens_at - self._monotonic())

    def spacing(self) -> float:
        """Return the seconds until the next request may be sent, by the rate that Per takes."""
        return self._cap.wait()

    def share(self, mean: float | None) -> None:
        """Go towards the mean rate of all that drain, so that their shares of Per's limit become equal."""
        if mean is not None:
            self._cap.approach(mean)

    def answered(self, sent_at: float) -> None:
        """Per answered a request about its activity: requests flow, and more of them."""
        if sent_at < self.closed_at and self._monotonic() < self._asked_until:
            return  # sent before Per asked to wait
        self.gate = self.reason = None
        self.failures = 0
        self._cap.taken()
        if self._limit < self._threshold:
            self._limit = min(self._limit + 1, self._max)
        elif self._latency < self._crowded:
            self._limit = min(self._limit + 1 / self._limit, self._max)
        self._look_at_latency(sent_at)

    def _look_at_latency(self, sent_at: float) -> None:
        now = self._monotonic()
        latency = now - sent_at
        if latency < self._lowest or now - self._lowest_at > _LATENCY_MEMORY:
            self._lowest, self._lowest_at = latency, now
        self._latency += (latency - self._latency) * _SMOOTHING
        if self._latency > _SLOW * self._lowest + _SLOWER:
            self.stumbled(sent_at)

    def stumbled(self, sent_at: float) -> None:
        """One request failed while others got through: send a little less, once in a round trip."""
        if sent_at >= self._shrunk_at:
            self._shrunk_at = self._monotonic()
            self._threshold = self._limit = max(1.0, self._limit * _SHRINK)

    def failed(self, sent_at: float, reason: str) -> None:
        """Nothing gets through: wait, longer each time."""
        if self.gate is Gate.RETRY_AFTER and self.wait() > 0:
            return
        if self._is_old(sent_at):
            return
        self.failures += 1
        if self.failures == 1:
            self._threshold = max(1.0, self._limit / 2)
        self._limit = 1.0 if self.failures > 1 else self._threshold
        self._close(Gate.BACKING_OFF, reason, jittered(self._policy.base, self._policy.cap, self.failures))

    def throttled(self, sent_at: float, reason: str, retry_after: float | None) -> None:
        """Per, or something before it, asked for fewer requests."""
        some_taken = self._cap.refused(sent_at)
        if retry_after is not None:
            self.asked_to_wait(reason, retry_after)
        elif not some_taken:
            self.failed(sent_at, reason)

    def throttled_alone(self) -> None:
        """What was refused for its rate is refused at any: it says nothing of the others' rate."""
        self._cap.doubt()

    def asked_to_wait(self, reason: str, retry_after: float) -> None:
        """Per, or something before it, says when to come back (seconds)."""
        wait = min(retry_after, self._policy.retry_after_cap)
        if self.gate is Gate.RETRY_AFTER and self._opens_at >= self._monotonic() + wait:
            return
        self._asked_until = max(self._asked_until, self._monotonic() + wait)
        self._close(Gate.RETRY_AFTER, reason, wait)

    def refused(self, sent_at: float, gate: Gate, reason: str) -> None:
        """Pause: the token is bad, or everything is refused for one reason."""
        if gate is self.gate and self._is_old(sent_at):
            return
        self.failures = self.failures + 1 if gate is self.gate else 1
        self._limit = 1.0
        bad_token = gate is Gate.BAD_TOKEN
        growing = min(PROBE_INTERVAL, 2.0 ** min(self.failures, 10))  # 2.0**1024 is an OverflowError
        self._close(gate, reason, growing if bad_token else PROBE_INTERVAL)

    def resume(self, gate: Gate, reason: str, wait: float) -> None:
        """Go on with what an earlier process had stored."""
        if gate is Gate.RETRY_AFTER:
            self._asked_until = self._monotonic() + wait
        self._close(gate, reason, wait)

    def wake(self) -> None:
        """Let one probe pass now and start the waits from the beginning; Retry-After stands."""
        if self.gate is None or self.gate is Gate.RETRY_AFTER:
            return
        self.failures = min(self.failures, 1)
        soonest = max(self._monotonic(), self._last_probe + _PROBE_SPACING, self._asked_until)
        self._opens_at = min(self._opens_at, soonest)

    def sending(self) -> None:
        """A request is about to be sent."""
        self._cap.sending()
        if self.gate is not None:
            self._last_probe = self._monotonic()

    def _is_old(self, sent_at: float) -> bool:
        """Tell whether a failure belongs to a round that has been counted: 32 in flight fail as one."""
        return self.gate is not None and sent_at < self.closed_at

    def _close(self, gate: Gate, reason: str, wait: float) -> None:
        self.gate, self.reason = gate, reason
        self.closed_at = self._monotonic()
        # Whatever else goes wrong meanwhile, nothing is sent before Per asked for it.
        self._opens_at = max(self.closed_at + wait, self._asked_until)
