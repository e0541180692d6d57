"""Fixtures for all tests: a running sandbox, queues that speak to it, and no thread left behind."""

import gc
import os
import sys
import threading
import traceback

import pytest
from hypothesis import HealthCheck, settings

from perqueue import PerQueue
from perqueue.sandbox import Sandbox
from tests import helpers, postgresql

# A busy machine is slow now and then; pytest's own timeout catches what hangs.
settings.register_profile("perqueue", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("perqueue")

database = postgresql.database

ENVIRONMENT = (
    "ACTIVITY_TYPE_ID",
    "PERQUEUE_DRAIN",
    "PERQUEUE_OUTBOX",
    "PER_ACTIVITY_TOKEN",
    "PER_ACTIVITY_TYPE_ID",
    "PER_BASE_URL",
    "PER_REPORTING_TOKEN",
)


def pytest_runtest_setup(item):
    """Skip, by name, what only root can try."""
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root")


def _perqueue_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("perqueue-")]


@pytest.fixture(autouse=True)
def _no_thread_left():
    """After each test, no thread of perqueue's own is left."""
    before = _perqueue_threads()
    yield
    left = [thread for thread in _perqueue_threads() if thread not in before]
    if left:
        gc.collect()  # a queue that was dropped without close() stops its threads once it is collected
    for thread in left:
        thread.join(timeout=5)
    alive = [thread for thread in left if thread.is_alive()]
    frames = sys._current_frames()
    where = "".join(
        f"{thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident]))}"
        for thread in alive
        if thread.ident in frames
    )
    assert alive == [], where


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    """No option comes from the environment that the tests happen to run in."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def per():
    """A local Per that listens."""
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def options(per):
    """What a queue or a client needs to speak to the sandbox."""
    return {
        "base_url": per.url,
        "activity_token": per.activity_token,
        "reporting_token": per.reporting_token,
        "activity_type_id": per.activity_type_id,
    }


@pytest.fixture
def outbox(tmp_path):
    """The path at which `make_queue` puts its outbox."""
    return tmp_path / "activities.db"


@pytest.fixture
def env(outbox, per):
    """The environment in which a child's ``PerQueue()`` delivers that outbox to the sandbox."""
    return helpers.environment(outbox, per)


@pytest.fixture
def make_queue(per, options, outbox):
    """Make queues on one outbox, all closed when the test ends: `make_queue(max_in_flight=1)`."""
    queues = []

    def make(path=outbox, **given):
        queue = PerQueue(path, **{**options, **given})
        queues.append(queue)
        return queue

    yield make
    per.clear_faults()
    per.release()
    for queue in reversed(queues):
        queue.close()


@pytest.fixture
def until():
    """Wait for something to be true: `until(lambda: queue.stats().pending == 0)`."""
    return lambda condition, timeout=10.0: helpers.until(condition, "it is true", timeout)


@pytest.fixture
def arrived(per):
    """Return what the sandbox has accepted: a set of (billing ID, user ID)."""
    return lambda: {(activity.billing_id, activity.user_id) for activity in per.activities}
