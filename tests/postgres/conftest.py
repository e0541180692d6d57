"""An outbox in PostgreSQL for each test, and children that share it."""

import itertools
import textwrap

import pytest

from tests.cli import conftest as commands
from tests.helpers import Child

env, perqueue, start = commands.env, commands.perqueue, commands.start

QUICK = """
from perqueue._outbox.postgres import leases
leases.LEASE = 4.0
"""
"""What a child begins with whose death must be noticed soon."""

_numbers = itertools.count(1)


@pytest.fixture
def outbox(database):
    """The URL at which `make_queue` puts its outbox: a schema of its own."""
    schema = f"test_{next(_numbers)}"
    database.sql(f"CREATE SCHEMA {schema}")
    return f"{database.url}?options=-csearch_path%3D{schema}"


@pytest.fixture
def sql(database, outbox):
    """Run statements in the test's schema: `sql("SELECT ...")`."""
    schema = outbox.rpartition("%3D")[2]
    return lambda *statements: database.sql(f"SET search_path = {schema}", *statements)


@pytest.fixture
def quick_leases(monkeypatch):
    """Leases of 4 seconds in this process."""
    from perqueue._outbox.postgres import leases

    monkeypatch.setattr(leases, "LEASE", 4.0)


@pytest.fixture
def child(env):
    """Start a child with a quick lease: `child(script)`."""
    started = []

    def begin(script, **more):
        process = Child(QUICK + textwrap.dedent(script), env={**env, **more})
        started.append(process)
        return process

    yield begin
    for process in started:
        process.__exit__(None, None, None)
