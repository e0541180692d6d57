"""What several looks at an outbox tell together: trends, rates, answer times, errors by their reason."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from perqueue.cli._health import Health, Mood, judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from perqueue._outbox.look import Look, Request
    from perqueue.cli._sight import Sight

LATELY_MS = 5 * 60_000
"""Over how long answer times are summed up."""
_SAMPLES = 900
_RATE_SECONDS = 10.0


class Sample(NamedTuple):
    """The counters at one moment."""

    at: float
    """By the monotonic clock."""
    pending: int
    recorded: int
    delivered: int
    mood: Mood


class Rates(NamedTuple):
    """Changes a second, over the last moments."""

    pending: float
    recorded: float
    delivered: float


class Percentiles(NamedTuple):
    """How long requests took, in milliseconds."""

    requests: int
    p50: int
    p95: int
    p99: int


class Errors(NamedTuple):
    """What went wrong, for one reason."""

    reason: str
    times: int
    last_at: int
    """Milliseconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """All that is shown at one moment."""

    sight: Sight
    health: Health
    rates: Rates | None
    """None until there were two looks."""
    answers: Percentiles | None
    """Requests that Per answered lately."""
    failures: Percentiles | None
    """Requests lately that brought no acceptance."""
    errors: list[Errors]
    history: list[Sample]


class Track:
    """Remembers what was seen, for a while."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=_SAMPLES)
        self._outbox_id: str | None = None

    def add(self, sight: Sight, at: float) -> Picture:
        """Take note of a look at a time of the monotonic clock."""
        health = judge(sight)
        look = sight.look
        if look is not None:
            if look.outbox_id != self._outbox_id:
                self._outbox_id = look.outbox_id
                self._samples.clear()  # another file has taken its place
            position = look.position
            self._samples.append(
                Sample(at, position.pending, position.last_id, position.accepted, health.mood)
            )
        since = sight.now - LATELY_MS
        return Picture(
            sight=sight,
            health=health,
            rates=self._rates(at) if look is not None else None,
            answers=_percentiles(look.answers if look else (), since),
            failures=_percentiles(look.failures if look else (), since),
            errors=_errors(look) if look is not None else [],
            history=list(self._samples),
        )

    def _rates(self, at: float) -> Rates | None:
        first = last = self._samples[-1]
        for sample in islice(reversed(self._samples), 1, None):
            # What was before an outage, say, tells nothing about now.
            if first is not last and (sample.at < at - _RATE_SECONDS or sample.mood != last.mood):
                break
            first = sample
        took = last.at - first.at
        if took <= 0:
            return None
        return Rates(
            (last.pending - first.pending) / took,
            max(0, last.recorded - first.recorded) / took,
            max(0, last.delivered - first.delivered) / took,
        )


def _percentiles(requests: Sequence[Request], since: int) -> Percentiles | None:
    took = sorted(request.duration_ms for request in requests if request.at >= since)
    if not took:
        return None
    p50, p95, p99 = (took[ceil(len(took) * share / 100) - 1] for share in (50, 95, 99))
    return Percentiles(len(took), p50, p95, p99)


def _errors(look: Look) -> list[Errors]:
    """Group failures and refusals by their reason, the latest first."""
    groups: dict[str, Errors] = {}
    for request in (*look.failures, *look.refusals):
        reason = str(request.reason)
        known = groups.get(reason, Errors(reason, 0, 0))
        groups[reason] = Errors(reason, known.times + 1, max(known.last_at, request.at))
    return sorted(groups.values(), key=lambda group: -group.last_at)
