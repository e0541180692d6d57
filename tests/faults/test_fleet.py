"""Many hosts and one Per that was away: each decides for itself, and together they must not bury it."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def model(monkeypatch):
    """The fleet in virtual time that the benchmark plays."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _fleet_model

    yield _fleet_model
    del sys.modules["_fleet_model"]


def test_a_fleet_comes_back_without_burying_per(model):
    """After an outage 250 hosts catch up as fast as Per takes it, and few answers are too late."""
    case = model.Case(hosts=250, recorded=20, takes=80, overload="waits", outage=450, shown=60)
    course = model.play(case, 2 * case.at_best)
    assert course.unfinished == 0
    assert course.caught_up[-1] < 1.1 * case.at_best
    assert max(course.came) < 1.7 * case.takes
    assert course.sent_twice < 0.05 * sum(course.taken)
    assert sum(course.before[-30:]) / 30 < 2 * 250 / 30  # probes: a host waits for half a minute on average


def test_a_fleet_shares_a_rate_limit(model):
    """Of a Per that says 429, 100 hosts take what it gives, and one request in four is refused at most."""
    case = model.Case(hosts=100, recorded=20, takes=80, overload="429, Retry-After", outage=300, shown=90)
    course = model.play(case, 3 * case.at_best)
    assert course.unfinished == 0
    assert course.caught_up[-1] < 1.5 * case.at_best
    assert sum(course.taken) > 0.75 * sum(course.came)
