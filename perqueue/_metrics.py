"""Metrics through OpenTelemetry's API: everything is fetched when somebody collects, and only then.

All instruments but the histograms are observable: their callbacks read plain numbers (see
:mod:`perqueue._measures`) and the outbox's counters on the collector's thread. Instruments cannot be
unregistered, so there is one set for each meter provider, which knows its queues by weak references.
"""

from __future__ import annotations

import logging
import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from perqueue._instruments import (
    OF_THE_OUTBOX,
    OF_THE_PROCESS,
    OUTCOME,
    RECORD_DURATION,
    REQUEST_DURATION,
)
from perqueue._measures import Measures
from perqueue._version import __version__
from perqueue.exceptions import PerQueueError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.metrics import CallbackOptions, Histogram, Meter, MeterProvider, Observation

    from perqueue._instruments import Attributes, HistogramSpec, Reading, Spec, Where

log = logging.getLogger("perqueue")


class Reported(Protocol):
    """A queue, as far as metrics go."""

    def _reading(self) -> Reading:
        """Look; may raise what ``stats()`` raises."""


class Book:
    """The queues that are reported to one meter provider, and the instruments for all of them.

    No lock: a collector's callback runs under the SDK's own, which creating an instrument takes, too.
    """

    def __init__(self) -> None:
        self._queues: weakref.WeakValueDictionary[int, Reported] = weakref.WeakValueDictionary()
        # Kept when a queue is closed: a job of seconds is collected once, when it is over.
        self._measures: dict[Where, Measures] = {}
        self._readings: dict[Where, Reading] = {}
        self._served: set[str] = set()
        self._record_duration: Histogram | None = None
        self._request_duration: Histogram | None = None

    def open(self, meter: Meter, key: int) -> None:
        """Create the instruments."""
        self._record_duration = _histogram(meter, RECORD_DURATION)
        self._request_duration = _histogram(meter, REQUEST_DURATION)
        for spec in (*OF_THE_OUTBOX, *OF_THE_PROCESS):
            # By the key: of two threads that open one provider's book at once, one's instruments are used.
            getattr(meter, spec.make)(spec.name, [partial(_observed, key, spec)], spec.unit, spec.description)

    def add(self, queue: Reported, where: Where) -> Measures:
        """Report a queue from now on; its measures are those of all queues of this process on one outbox."""
        self._queues[id(queue)] = queue
        return self._measures.setdefault(where, Measures())

    def forget(self) -> None:
        """In a forked child: what the parent did is the parent's to report."""
        for measures in self._measures.values():
            measures.forget()

    def values(self, spec: Spec) -> Iterator[tuple[float, Attributes]]:
        """Return what an instrument has to show now, for each outbox."""
        self._begin(spec)
        of_the_outbox = spec in OF_THE_OUTBOX
        sources: dict[Where, Any] = self._readings if of_the_outbox else self._measures
        for where, source in list(sources.items()):
            for value, attributes in spec.read(source):
                yield value, where.attributes() | attributes

    def _begin(self, spec: Spec) -> None:
        """Look at each outbox once a collection: an instrument that asks again begins the next."""
        if self._served and spec.name not in self._served:
            self._served.add(spec.name)
            return
        self._served = {spec.name}
        self._readings = self._look()
        try:
            self._hand_over()
        except Exception as error:  # noqa: BLE001 - the other instruments may work
            log.debug("durations cannot be handed over: %s", error)

    def _look(self) -> dict[Where, Reading]:
        readings: dict[Where, Reading] = {}
        for reference in self._queues.valuerefs():  # a copy: others add and drop queues meanwhile
            queue = reference()
            if queue is None:
                continue
            try:
                reading = queue._reading()  # noqa: SLF001
            except PerQueueError:
                continue  # closed, locked or damaged: a gap says that nothing is known
            other = readings.get(reading.where)
            if other is None or (reading.drains and not other.drains):
                readings[reading.where] = reading
        return readings

    def _hand_over(self) -> None:
        for where, measures in list(self._measures.items()):
            attributes = where.attributes()
            if self._record_duration is not None:
                for seconds in measures.recorded.take():
                    self._record_duration.record(seconds, attributes)
            if self._request_duration is not None:
                for seconds, kind in measures.requested.take():
                    self._request_duration.record(seconds, {**attributes, OUTCOME: str(kind)})


def _histogram(meter: Meter, spec: HistogramSpec) -> Histogram:
    return meter.create_histogram(
        spec.name, spec.unit, spec.description, explicit_bucket_boundaries_advisory=spec.buckets
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


def report(queue: Reported, where: Where, provider: MeterProvider | None) -> Measures | None:
    """Report a queue through a meter provider; return where it is to put what it measures itself.

    None stands for OpenTelemetry's global one. If the provider does nothing, or raises, None is returned, and
    nothing is measured.
    """
    from opentelemetry.metrics import NoOpMeterProvider

    if isinstance(provider, NoOpMeterProvider):
        return None
    try:
        return _book(provider).add(queue, where)
    except Exception as error:  # noqa: BLE001 - recording matters more
        log.warning("there are no metrics: the meter provider raised %s", type(error).__name__)
        return None


def _book(provider: MeterProvider | None) -> Book:
    """Return the one book of a provider: the global one may be a stand-in yet, which later becomes it."""
    from opentelemetry.metrics import get_meter_provider

    current = get_meter_provider()
    given = current if provider is None else provider
    key = _GLOBAL if given is current and id(given) not in _books else id(given)
    if key not in _books:
        book = Book()
        book.open(given.get_meter("perqueue", __version__), key)
        _books.setdefault(key, (given, book))  # of two threads at once, one's is used by both
    return _books[key][1]
