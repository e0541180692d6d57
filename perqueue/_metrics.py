"""Metrics through OpenTelemetry's API: everything is fetched when somebody collects, and only then.

All instruments but the histograms are observable: their callbacks read plain numbers (see
:mod:`perqueue._measures`) and the outbox's counters on the collector's thread. Instruments cannot be
unregistered, so there is one set for each meter provider, which knows its queues by weak references.
"""

from __future__ import annotations

import logging
import os
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from perqueue._measures import Measures
from perqueue._stats import DrainState
from perqueue._version import __version__
from perqueue.exceptions import ConfigurationError, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation

    from perqueue._outbox import Position
    from perqueue._stats import Stats

    Attributes = dict[str, str]
    Values = Iterable[tuple[float, Attributes]]

log = logging.getLogger("perqueue")

PATH = "perqueue.outbox.path"
FILE = "perqueue.outbox.file"
STATE = "perqueue.drain.state"
OUTCOME = "perqueue.outcome"
ERROR = "error.type"

_RECORD_BUCKETS = (5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 1e-3, 2.5e-3, 0.01, 0.05, 0.25, 1.0)
# What OpenTelemetry's semantic conventions advise for the durations of requests.
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)


class Reading(NamedTuple):
    """What a queue knows at one moment."""

    path: Path
    position: Position
    stats: Stats
    works: bool
    """Whether this process's worker runs."""

    @property
    def state(self) -> DrainState:
        """What this process's drain does: not what it would do once it is started."""
        if self.works or self.stats.state is DrainState.PAUSED:
            return self.stats.state
        return DrainState.OFF

    @property
    def drains(self) -> bool:
        """Whether this process is the one that delivers."""
        return self.state not in (DrainState.OFF, DrainState.STANDBY)


class Reported(Protocol):
    """A queue, as far as metrics go."""

    def _reading(self) -> Reading:
        """Look; may raise what ``stats()`` raises."""


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
    for file, path in (("database", str(r.path)), ("wal", f"{r.path}-wal")):
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
RECORD_DURATION = ("perqueue.record.duration", "s", "Duration of record(), a sample of at most 1000 a collection")
REQUEST_DURATION = (
    "perqueue.drain.request.duration",
    "s",
    "Duration of delivering one activity, a sample of at most 1000 a collection",
)


class Book:
    """The queues that are reported to one meter provider, and the instruments for all of them.

    No lock: a collector's callback runs under the SDK's own, which creating an instrument takes, too.
    """

    def __init__(self) -> None:
        self._queues: dict[int, weakref.ref[Reported]] = {}
        # Kept when a queue is closed, and gone with the process: a job of seconds is collected once, at its end.
        self._measures: dict[Path, Measures] = {}
        self._readings: dict[Path, Reading] = {}
        self._served: set[str] = set()
        self._record_duration: Histogram | None = None
        self._request_duration: Histogram | None = None

    def open(self, meter: Meter, key: int) -> None:
        """Create the instruments."""
        self._record_duration = _histogram(meter, RECORD_DURATION, _RECORD_BUCKETS)
        self._request_duration = _histogram(meter, REQUEST_DURATION, _REQUEST_BUCKETS)
        for spec in (*OF_THE_OUTBOX, *OF_THE_PROCESS):
            # By the key: of two threads that open one provider's book at once, one's instruments are used.
            getattr(meter, spec.make)(spec.name, [partial(_observed, key, spec)], spec.unit, spec.description)

    def add(self, queue: Reported, path: Path) -> Measures:
        """Report a queue from now on; its measures are those of all queues of this process on one outbox."""
        key, queues = id(queue), self._queues
        queues[key] = weakref.ref(queue, lambda _: queues.pop(key, None))
        return self._measures.setdefault(path, Measures())

    def remove(self, queue: Reported) -> None:
        """Report it no more, except for what this process did."""
        self._queues.pop(id(queue), None)

    def forget(self) -> None:
        """In a forked child: what the parent did is the parent's to report."""
        for measures in self._measures.values():
            measures.forget()

    def values(self, spec: Spec) -> Iterator[tuple[float, Attributes]]:
        """Return what an instrument has to show now, for each outbox."""
        self._begin(spec)
        of_the_outbox = spec in OF_THE_OUTBOX
        sources: dict[Path, Any] = self._readings if of_the_outbox else self._measures
        for path, source in list(sources.items()):
            for value, attributes in spec.read(source):
                yield value, {PATH: str(path), **attributes}

    def _begin(self, spec: Spec) -> None:
        """Look at each outbox once a collection: an instrument that asks again begins the next."""
        if self._served and spec.name not in self._served:
            self._served.add(spec.name)
            return
        self._served = {spec.name}
        self._hand_over()
        self._readings = self._look()

    def _look(self) -> dict[Path, Reading]:
        readings: dict[Path, Reading] = {}
        for reference in list(self._queues.values()):
            queue = reference()
            if queue is None:
                continue
            try:
                reading = queue._reading()  # noqa: SLF001
            except PerQueueError:
                continue  # locked, damaged, closed just now: a gap says that nothing is known
            other = readings.get(reading.path)
            if other is None or (reading.drains and not other.drains):
                readings[reading.path] = reading
        return readings

    def _hand_over(self) -> None:
        for path, measures in list(self._measures.items()):
            attributes = {PATH: str(path)}
            if self._record_duration is not None:
                for seconds in measures.recorded.take():
                    self._record_duration.record(seconds, attributes)
            if self._request_duration is not None:
                for seconds, kind in measures.requested.take():
                    self._request_duration.record(seconds, {**attributes, OUTCOME: str(kind)})


def _histogram(meter: Meter, named: tuple[str, str, str], buckets: Iterable[float]) -> Histogram:
    name, unit, description = named
    return meter.create_histogram(
        name, unit, description, explicit_bucket_boundaries_advisory=tuple(buckets)
    )


def _observed(key: int, spec: Spec, _: CallbackOptions) -> list[Observation]:
    from opentelemetry.metrics import Observation

    try:
        return [Observation(value, attributes) for value, attributes in _books[key][1].values(spec)]
    except Exception as error:  # noqa: BLE001 - a collector must get what there is from all the others
        log.debug("%s cannot be measured: %s", spec.name, error)
        return []


_GLOBAL = 0
_books: dict[int, tuple[object, Book]] = {}


def _forget() -> None:
    for _, book in _books.values():
        book.forget()


os.register_at_fork(after_in_child=_forget)


def report(queue: Reported, path: Path, provider: MeterProvider | None) -> Measures | None:
    """Report a queue through a meter provider; return where it is to put what it measures itself.

    Without a provider: through OpenTelemetry's global one, if this process has loaded OpenTelemetry's metrics
    by now; else nothing is measured, and None is returned. A provider that raises means no metrics, too.
    Raises :class:`ConfigurationError` if one is given, and OpenTelemetry is not installed.
    """
    if provider is None and "opentelemetry.metrics" not in sys.modules:
        return None
    try:
        from opentelemetry.metrics import NoOpMeterProvider
    except ImportError:
        message = "meter_provider needs OpenTelemetry's API: pip install 'useper-perqueue[otel]'"
        raise ConfigurationError(message) from None
    if isinstance(provider, NoOpMeterProvider):
        return None
    try:
        return _book(provider).add(queue, path)
    except Exception as error:  # noqa: BLE001 - recording matters more
        log.warning("there are no metrics: the meter provider raised %s", type(error).__name__)
        return None


def _book(provider: MeterProvider | None) -> Book:
    """Return the one book of a provider: the global one has been a stand-in perhaps, and is now itself."""
    from opentelemetry.metrics import get_meter_provider

    key, given = id(provider), provider
    if key not in _books and (given is None or given is get_meter_provider()):
        given = get_meter_provider()
        key = id(given) if id(given) in _books else _GLOBAL
    known = _books.get(key)
    if known is None:
        book = Book()
        book.open(given.get_meter("perqueue", __version__), key)
        known = _books.setdefault(key, (given, book))  # of two threads at once, one's is used by both
    return known[1]


def withdraw(queue: Reported) -> None:
    """Report a queue no more that has been reported; what this process did with it stays."""
    for _, book in list(_books.values()):
        book.remove(queue)
