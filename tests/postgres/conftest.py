"""An outbox in PostgreSQL for each test, and children that share it."""

import itertools
import textwrap
from types import SimpleNamespace

import pytest

from perqueue import OutboxError
from tests import postgresql
from tests.cli import conftest as commands
from tests.helpers import Child, until

env, perqueue, start = commands.env, commands.perqueue, commands.start
mortal = postgresql.mortal

QUICK = """
from tests.postgres.quick import shorten
shorten()
"""
"""What a child begins with whose death must be noticed soon."""

RECORD = """
over, careless = sys.argv[1:]
queue = PerQueue(drain=False)
number = failures = 0
say("ready")
while not os.path.exists(over):
    name = f"{os.getpid()}-{number}"
    number += 1
    if careless:
        say(name)
    try:
        queue.record("GROUP", name)
    except OutboxError:
        failures += 1
        if failures == 2:
            open(f"{over}-{os.getpid()}", "w").close()
        time.sleep(0.05)
        continue
    if not careless:
        say(name)
    time.sleep(0.002)
os._exit(0)
"""
"""Records until a file is there. A careless one acknowledges before the database does: the control."""

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


def recorded(queue, user="AFTER"):
    """Try to record, and tell whether it could be stored."""
    try:
        queue.record("GROUP", user)
    except OutboxError:
        return False
    return True


@pytest.fixture
def quick_leases(monkeypatch):
    """Short leases in this process."""
    from tests.postgres.quick import shorten

    shorten(monkeypatch.setattr)


@pytest.fixture
def child(env):
    """Start a child with a quick lease: `child(script)`."""
    started = []

    def begin(script, *arguments, wrapper=(), **more):
        process = Child(QUICK + textwrap.dedent(script), *arguments, env={**env, **more}, wrapper=wrapper)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.__exit__(None, None, None)


@pytest.fixture
def recorders(child, tmp_path):
    """Record in a process and in a careless one: `recorders.start(url)`, `recorders.end()`."""
    over = tmp_path / "over"
    started = []

    def begin(url):
        kinds = ("", "careless")
        started.extend(child(RECORD, over, careless, PERQUEUE_OUTBOX=url) for careless in kinds)
        for process in started:
            process.expect("ready")

    def noticed():
        """Wait until all of them have met errors."""
        until(lambda: all(over.with_name(f"over-{each.pid}").exists() for each in started), "all notice")

    def end():
        """Return what they acknowledged: carefully, and carelessly."""
        over.touch()
        for process in started:
            process.wait()
        return [set(process._output.rest()) for process in started]

    return SimpleNamespace(start=begin, noticed=noticed, end=end)
