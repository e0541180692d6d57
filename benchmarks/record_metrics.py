"""What metrics cost ``record()``: off, on, and called as an instrumentation would from outside."""

from __future__ import annotations

import functools
from time import perf_counter
from typing import TYPE_CHECKING

import _peers
import _rounds

if TYPE_CHECKING:
    from pathlib import Path

CALLS = 20_000


def measure(folder: Path, part: float, *, metrics: bool, direct: bool) -> _rounds.Metrics:
    """Record, with the SDK's provider if metrics are on; ``direct``: with its histogram around each."""
    if not metrics and not direct:
        with _peers.perqueue(folder) as call:
            return _rounds.percentiles(_rounds.timed(call, int(CALLS * part)))
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    provider = MeterProvider([InMemoryMetricReader()])
    histogram = provider.get_meter("benchmark").create_histogram("record.duration", "s")
    attributes = {"perqueue.outbox.path": str(folder)}
    with _peers.perqueue(folder, **({"meter_provider": provider} if metrics else {})) as call:

        def around(number: int) -> None:
            began = perf_counter()
            call(number)
            histogram.record(perf_counter() - began, attributes)

        return _rounds.percentiles(_rounds.timed(around if direct else call, int(CALLS * part)))


if __name__ == "__main__":
    _rounds.main(
        "record_metrics",
        "record_metrics.py",
        "What metrics cost record().",
        (
            _rounds.Case(
                group="record() with metrics",
                name=name,
                base=name == "off",
                run=functools.partial(measure, metrics=metrics, direct=direct),
            )
            for name, metrics, direct in (
                ("off", False, False),
                ("on", True, False),
                ("off, and a call of the SDK's histogram around it", False, True),
            )
        ),
    )
