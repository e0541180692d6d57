"""The examples as a reader runs them: copied to a folder, with the environment that the recipes ask for."""

import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import environment, until, users

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _children_are_not_measured(monkeypatch):
    """Servers fork and are killed: coverage would only slow them."""
    for name in [name for name in os.environ if name.startswith(("COVERAGE_", "COV_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def env(outbox, per):
    """What somebody has exported before an example is run."""
    return environment(outbox, per)


@pytest.fixture
def copied(tmp_path):
    """Copy examples to a folder from which they are imported."""

    def copy(*names):
        for name in names:
            source = EXAMPLES / name
            if source.is_dir():
                shutil.copytree(source, tmp_path, dirs_exist_ok=True)
            else:
                shutil.copy(source, tmp_path)
        return tmp_path

    return copy


class Users:
    """Make requests, and keep which users were told that they succeeded."""

    def __init__(self, server, more=""):
        self._server = server
        self._more = more
        self.asked = set()
        self.answered = set()

    def come(self, name, count):
        """Make so many requests from four threads."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._come, [f"{name}-{n}" for n in range(count)]))

    def _come(self, user):
        self.asked.add(user)
        try:
            status, _ = self._server.request("POST", f"export?company=ACME&user={user}{self._more}")
        except OSError:  # its worker was killed: whether it recorded, nobody knows
            return
        if status == 200:
            self.answered.add(user)


def restarted_and_killed(server, come):
    """Load a server, replace its workers by SIGHUP, kill one of them, and load it again and again."""
    come("first")
    until(lambda: len(server.workers()) == 2, "both workers are there", 20)
    before = server.workers()
    server.process.send_signal(signal.SIGHUP)
    come("meanwhile")
    until(lambda: not before & server.workers(), "workers are replaced", 20)
    come("second")
    killed = min(server.workers())
    os.kill(killed, signal.SIGKILL)
    come("after")
    until(lambda: len(server.workers() - {killed}) == 2, "a new worker comes", 20)
    come("last")


def assert_counted(per, make_queue, visitors):
    """Whoever was told of success has arrived, at the latest with the next start; nobody who never came."""
    make_queue(activity_type_id="TYPE").flush(20)
    received = set(users(per))
    assert visitors.answered <= received <= visitors.asked
    assert len(visitors.answered) > 40
