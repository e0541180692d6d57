"""How many requests a second Per takes, learnt from its refusals (429).

After the first refusal the rate begins with what was taken so far and doubles each second, until Per
refuses again: then a limit is known. From there it follows the curve of TCP's CUBIC (RFC 9438): quickly
back towards the rate at which Per refused, slowly about there, and faster the longer Per has not refused.
So it stays close under a limit, and finds out when the limit is gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_CUT = 0.95
"""What is left of the rate after a refusal, where it is known."""
_DEEPEST_CUT = 0.8
_PLATEAU = 15.0
"""Seconds after which the rate is back where Per refused."""
_GROWN = 1.1
"""How far a search must have come for its refusal to mean a limit."""
_GONE = 1.25
"""How far beyond the rate at which Per refused it must take requests for that limit to be gone."""
_IDLE = 1.0
"""Seconds without a request after which there was nothing to send."""
_LEAST = 0.5
"""Requests a second below which the rate does not fall."""
_LAG = 0.005
"""Seconds of requests that may be made up for at once, since no timer is exact."""
_LONGEST_SEARCH = 30.0
"""Seconds after which the rate doubles no more: by then it is beyond any server's."""


class RateCap:
    """Spaces requests out, once Per has refused some for being too many."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._base: float | None = None
        self._searching = True
        self._cut_at = self._since = self._sent_at = monotonic()
        self._resumed_at: float | None = None
        self._taken = 0
        self._next_at = float("-inf")

    @property
    def rate(self) -> float | None:
        """Requests a second; None as long as Per has refused none."""
        if self._base is None:
            return None
        since = 0.0 if self._resumed_at is None else self._monotonic() - self._resumed_at
        if self._searching:
            return float(self._base * 2.0 ** min(since, _LONGEST_SEARCH))
        return float(self._base * (1 + (1 - _CUT) * ((since - _PLATEAU) / _PLATEAU) ** 3))

    def wait(self) -> float:
        """Return the seconds until the next request may be sent."""
        return 0.0 if self._base is None else max(0.0, self._next_at - self._monotonic())

    def sending(self) -> None:
        """A request is about to be sent."""
        now = self._monotonic()
        idle = now - max(self._sent_at, self._next_at)
        self._sent_at = now
        if self._resumed_at is None:
            self._resumed_at = now
            self._since = now if self._base is None else self._since
        elif idle > _IDLE:
            # Time in which nothing was sent says nothing of what would have been taken.
            self._resumed_at += idle
            self._since += idle
        rate = self.rate
        if rate is not None and self._base is not None:
            if not self._searching and rate > _GONE * self._base:
                self._searching, self._base, self._resumed_at = True, rate, now
            self._next_at = max(self._next_at, now - _LAG) + 1 / rate

    def approach(self, mean: float) -> None:
        """Go half the way from this rate to another; where all do so, their sum stays about what it is.

        A mean of many times this rate may be one drainer's error, and counts as four times.
        """
        rate = self.rate
        if rate is not None and self._base is not None:
            self._base = max(_LEAST, self._base * (1 + min(max(mean / rate, 0.0), 4.0)) / 2)

    def taken(self) -> None:
        """Per took a request."""
        self._taken += 1

    def doubt(self) -> None:
        """Search anew from here: who was refused is refused at any rate."""
        rate = self.rate
        if rate is not None:
            self._searching, self._base, self._resumed_at = True, rate, None

    def refused(self, sent_at: float) -> bool:
        """Per refused a request for being one too many; tell whether it has taken any since the cut before.

        Requests sent before a cut say nothing about the rate after it.
        """
        if sent_at < self._cut_at:
            return True
        any_taken = self._taken > 0
        now = self._monotonic()
        average = self._taken / max(now - self._since, 1e-3)  # pauses that Per asked for included
        rate = self.rate
        if rate is None or self._base is None:
            self._base = average
        elif not self._searching:
            self._base = min(rate, max(average, _DEEPEST_CUT * rate))
        elif rate >= _GROWN * self._base:
            self._searching = False
            self._base = rate
        else:
            self._base = min(rate, average)
        self._base = max(_LEAST, self._base)
        self._cut_at = self._since = now
        self._resumed_at = None
        self._taken = 0
        return any_taken
