"""What another backend, and psycopg's connections, are to the code that joins: no more than statements."""

import asyncio
import sqlite3
import sys
from contextlib import closing
from types import ModuleType

import pytest

from perqueue import ConfigurationError
from perqueue._joining import Entry, ajoin, join
from perqueue._joints import _in_style


class Backend:
    """An outbox elsewhere, which needs one statement to be recorded into."""

    dialect = "postgresql"

    def joining(self, key, window, recorded_at):
        ((activity_id,),) = yield "INSERT INTO activity VALUES (?, ?, ?, ?) RETURNING id", (*key, recorded_at)
        return activity_id


class Cursor:
    description = ("id",)

    def __init__(self, ran):
        self.ran = ran

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def execute(self, statement, values):
        self.ran.append((statement, values))

    def fetchall(self):
        return [(7,)]


class AsyncCursor:
    description = ("id",)

    def __init__(self, ran):
        self.ran = ran

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def execute(self, statement, values):
        self.ran.append((statement, values))

    async def fetchall(self):
        return [(7,)]


class Connection:
    def __init__(self):
        self.ran = []

    def cursor(self, *, row_factory):
        assert row_factory == "tuple_row"
        return Cursor(self.ran)


class AsyncConnection:  # no kind of a Connection, as psycopg's is none
    def __init__(self):
        self.ran = []

    def cursor(self, *, row_factory):
        assert row_factory == "tuple_row"
        return AsyncCursor(self.ran)


@pytest.fixture(autouse=True)
def _psycopg(monkeypatch):
    """A module that looks like psycopg as far as it is used."""
    module, rows = ModuleType("psycopg"), ModuleType("psycopg.rows")
    module.Connection, module.AsyncConnection = Connection, AsyncConnection
    rows.tuple_row = "tuple_row"
    monkeypatch.setitem(sys.modules, "psycopg", module)
    monkeypatch.setitem(sys.modules, "psycopg.rows", rows)


@pytest.fixture
def entry():
    return Entry(Backend(), ("SHOP", "CUSTOMER", "TYPE"), None, 12, lambda: None)


RAN = [("INSERT INTO activity VALUES (%s, %s, %s, %s) RETURNING id", ("SHOP", "CUSTOMER", "TYPE", 12))]


def test_a_backend_is_its_statements(entry):
    """A connection of psycopg runs them in its own manner, and one to another database is refused."""
    connection = Connection()
    assert join(connection, entry) == 7
    assert connection.ran == RAN
    with pytest.raises(ConfigurationError, match=r"arecord"):
        join(AsyncConnection(), entry)
    with (
        closing(sqlite3.connect(":memory:")) as other,
        pytest.raises(ConfigurationError, match="a sqlite datab"),
    ):
        join(other, entry)


def test_a_backend_is_its_statements_when_awaited(entry):
    """The same with psycopg's AsyncConnection."""
    connection = AsyncConnection()
    assert asyncio.run(ajoin(connection, entry)) == 7
    assert connection.ran == RAN


@pytest.mark.parametrize(
    ("style", "written"),
    [
        ("qmark", "a ? b ?"),
        ("format", "a %s b %s"),
        ("pyformat", "a %s b %s"),
        ("numeric_dollar", "a $1 b $2"),
    ],
)
def test_values_are_marked_as_the_driver_wants(style, written):
    """A statement is told once, and runs with every driver."""
    assert _in_style("a ? b ?", style) == written
