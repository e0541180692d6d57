"""The promises of every outbox, kept by one in PostgreSQL: each test has a schema of its own."""

import itertools

import pytest

from tests.cli.conftest import env, perqueue, start
from tests.postgresql import Server, binaries

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def database():
    """A PostgreSQL server of this run's own."""
    if binaries() is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def outbox(database):
    """The URL at which `make_queue` puts its outbox."""
    schema = f"test_{next(_numbers)}"
    database.sql(f"CREATE SCHEMA {schema}")
    return f"{database.url}?options=-csearch_path%3D{schema}"


_OF_A_FILE = {
    "test_a_drain_that_cannot_be_elected_says_why": "there is no election",
    "test_a_flush_never_takes_a_damaged_row_for_delivered": "a server has checksums of its own",
    "test_a_queue_that_was_never_used_does_nothing": "it registers as a drainer",
    "test_ten_threads_record_while_another_closes": "looks into the file",
}
"""Tests of the file, and why no database has to pass them."""


def pytest_collection_modifyitems(config, items):
    """Leave out what is about files alone."""
    here = [item for item in items if "conformance" in item.nodeid]
    left_out = [item for item in here if item.originalname in _OF_A_FILE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
