"""A local Per, an outbox's path, and the environment that leads a child process to both."""

import pytest

from perqueue.sandbox import Sandbox
from tests.helpers import environment


@pytest.fixture
def per():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def outbox(tmp_path):
    return tmp_path / "outbox.db"


@pytest.fixture
def env(outbox, per):
    return environment(outbox, per)
