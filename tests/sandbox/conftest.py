"""A running sandbox, and the shortest way to talk to it."""

import threading
from datetime import UTC, datetime

import httpx
import pytest

from perqueue.sandbox import Sandbox


@pytest.fixture(autouse=True)
def _no_thread_left():
    yield
    assert [thread for thread in threading.enumerate() if thread.name == "per-sandbox"] == []


class Clock:
    """Shows the real time, until a test sets `now`."""

    now = None

    def __call__(self):
        return self.now or datetime.now(UTC)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def per(clock):
    with Sandbox(clock=clock) as sandbox:
        yield sandbox


@pytest.fixture
def client():
    with httpx.Client(timeout=5, trust_env=False) as each:
        yield each


@pytest.fixture
def add(per, client):
    """Adds one activity: `add(user="USER_2")`."""

    def send(billing="GROUP_A", user="USER_1", kind="sandbox-activity-type", token=None):
        return client.get(
            f"{per.url}/activities.add",
            params={"billingId": billing, "userId": user, "activityTypeId": kind},
            headers={"Authorization": f"Bearer {token or per.activity_token}"},
        )

    return send


@pytest.fixture
def report(per, client):
    """Asks for a report: `report(start="2018-12-01T00:00:00Z")`."""

    def send(token=None, **params):
        headers = {"Authorization": f"Bearer {token or per.reporting_token}"}
        return client.get(f"{per.url}/reports.get", params=params, headers=headers)

    return send
