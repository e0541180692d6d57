"""A meter provider of the test's own, and what it has collected."""

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from perqueue._instruments import PATH
from tests.helpers import environment


class Collected:
    """What one collection brought."""

    def __init__(self, data):
        self.points = [
            (metric.name, dict(point.attributes), getattr(point, "value", point))
            for resource in (data.resource_metrics if data else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        ]
        self.names = {name for name, _, _ in self.points}

    def __call__(self, name, path=None, **wanted):
        """Return the one value of a metric with these attributes (`outcome="accepted"`); None if none."""
        found = [
            value
            for each, attributes, value in self.points
            if each == name
            and (path is None or attributes[PATH] == str(path))
            and wanted.items() <= {key.rpartition(".")[2]: v for key, v in attributes.items()}.items()
        ]
        assert len(found) < 2, found
        return found[0] if found else None

    def state(self, path=None):
        """Return the one state that is on."""
        (state,) = [
            attributes["perqueue.drain.state"]
            for name, attributes, value in self.points
            if name == "perqueue.drain.status" and value and path in (None, attributes[PATH])
        ]
        return state


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader):
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


@pytest.fixture
def collect(reader):
    """Collects, as an exporter does."""
    return lambda: Collected(reader.get_metrics_data())


@pytest.fixture
def env(outbox, per):
    """What a child needs for its `PerQueue()`."""
    return environment(outbox, per)
