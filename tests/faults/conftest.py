"""The environment that leads a child process to the test's outbox and local Per."""

import pytest

from tests.helpers import environment


@pytest.fixture
def env(outbox, per):
    """What a child needs for its ``PerQueue()``."""
    return environment(outbox, per)
