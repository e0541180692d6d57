"""The instruments that metrics are made of: names, units, meaning, and where the values come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from perqueue._stats import DrainState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from perqueue._address import DatabaseURL
    from perqueue._measures import Measures
    from perqueue._outbox import Position
    from perqueue._stats import Stats

    Attributes = dict[str, str]
    Values = Iterable[tuple[float, Attributes]]

PATH = "perqueue.outbox.path"
ID = "perqueue.outbox.id"
FILE = "perqueue.outbox.file"
STATE = "perqueue.drain.state"
OUTCOME = "perqueue.outcome"
ERROR = "error.type"


class Where(NamedTuple):
    """Which outbox it is: what every measurement says."""

    place: Path | DatabaseURL
    outbox_id: str
    """The same for all processes that have it open, and for no other outbox."""

    def attributes(self) -> Attributes:
        """Return it as attributes."""
        return {PATH: str(self.place), ID: self.outbox_id}


class Reading(NamedTuple):
    """What a queue knows at one moment."""

    where: Where
    position: Position
    stats: Stats
    state: DrainState
    """What this process's own drain does; ``stats`` tells also what keeps another one from delivering."""

    @property
    def drains(self) -> bool:
        """Whether this process is the one that delivers."""
        return self.state not in (DrainState.OFF, DrainState.STANDBY)


def _pending(r: Reading) -> Values:
    yield r.position.pending, {}


def _oldest_age(r: Reading) -> Values:
    yield r.stats.oldest_pending_age or 0.0, {}


def _recorded(r: Reading) -> Values:
    yield r.position.last_id, {}


def _delivered(r: Reading) -> Values:
    yield r.position.accepted, {}


def _rejected(r: Reading) -> Values:
    yield r.position.rejected, {}


def _damaged(r: Reading) -> Values:
    yield r.position.damaged, {}


def _holds(r: Reading) -> Values:
    yield r.position.pauses, {}


def _size(r: Reading) -> Values:
    if not isinstance(r.where.place, Path):
        return  # a database has its own metrics
    for file, path in (("database", str(r.where.place)), ("wal", f"{r.where.place}-wal")):
        try:
            yield os.stat(path).st_size, {FILE: file}  # noqa: PTH116 - stat, never open: see the outbox's locks
        except FileNotFoundError:
            yield 0, {FILE: file}


def _state(r: Reading) -> Values:
    for state in DrainState:
        yield int(state is r.state), {STATE: str(state)}


def _in_flight(r: Reading) -> Values:
    yield r.stats.in_flight, {}


def _limit(r: Reading) -> Values:
    yield r.stats.in_flight_limit if r.drains else 0, {}


def _requests(m: Measures) -> Values:
    for (kind, error), count in list(m.requests.items()):
        yield count, {OUTCOME: str(kind)} | ({} if error is None else {ERROR: str(error)})


def _not_recorded(m: Measures) -> Values:
    for name, count in list(m.not_recorded.items()):
        yield count, {ERROR: name}


class Spec(NamedTuple):
    """An instrument: how it is made, and where its values come from."""

    make: str
    name: str
    unit: str
    description: str
    read: Callable[[Any], Values]


OF_THE_OUTBOX = (
    Spec(
        "create_observable_gauge",
        "perqueue.outbox.pending",
        "{activity}",
        "Recorded activities that Per has neither accepted nor refused",
        _pending,
    ),
    Spec(
        "create_observable_gauge",
        "perqueue.outbox.oldest_age",
        "s",
        "Age of the oldest pending activity; 0 when none is pending",
        _oldest_age,
    ),
    Spec(
        "create_observable_counter",
        "perqueue.outbox.recorded",
        "{activity}",
        "Activities ever recorded into the outbox, by any process",
        _recorded,
    ),
    Spec(
        "create_observable_counter",
        "perqueue.outbox.delivered",
        "{activity}",
        "Activities that Per has accepted, delivered by any process",
        _delivered,
    ),
    Spec(
        "create_observable_gauge",
        "perqueue.outbox.rejected",
        "{activity}",
        "Activities that Per refused and nobody has requeued or discarded",
        _rejected,
    ),
    Spec(
        "create_observable_gauge",
        "perqueue.outbox.damaged",
        "{activity}",
        "Activities whose rows are not what was recorded, or are missing",
        _damaged,
    ),
    Spec(
        "create_observable_counter",
        "perqueue.outbox.pauses",
        "{pause}",
        "How often sending was held up: a backoff after each failed probe, a Retry-After, a pause",
        _holds,
    ),
    Spec("create_observable_gauge", "perqueue.outbox.size", "By", "Size of the outbox's files", _size),
    Spec(
        "create_observable_up_down_counter",
        "perqueue.drain.status",
        "{drain}",
        "1 for the state that this process's drain is in, 0 for the others",
        _state,
    ),
    Spec(
        "create_observable_up_down_counter",
        "perqueue.drain.in_flight",
        "{request}",
        "Requests that this process waits for",
        _in_flight,
    ),
    Spec(
        "create_observable_up_down_counter",
        "perqueue.drain.in_flight_limit",
        "{request}",
        "How many requests this process would have in flight at most, now",
        _limit,
    ),
)
OF_THE_PROCESS = (
    Spec(
        "create_observable_counter",
        "perqueue.drain.requests",
        "{request}",
        "Requests of this process that ended, by what came of them",
        _requests,
    ),
    Spec(
        "create_observable_counter",
        "perqueue.record.failures",
        "{activity}",
        "Activities that this process's record() could not store",
        _not_recorded,
    ),
)


class HistogramSpec(NamedTuple):
    """A histogram, and the buckets that it advises."""

    name: str
    unit: str
    description: str
    buckets: tuple[float, ...]


RECORD_DURATION = HistogramSpec(
    "perqueue.record.duration",
    "s",
    "Duration of record(), a sample of at most 1000 a collection",
    (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 0.01, 0.05, 0.25, 1.0),
)
REQUEST_DURATION = HistogramSpec(
    "perqueue.drain.request.duration",
    "s",
    "Duration of delivering one activity, a sample of at most 1000 a collection",
    # What OpenTelemetry's semantic conventions advise for the durations of requests.
    (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
