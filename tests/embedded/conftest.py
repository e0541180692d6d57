"""An application with a database of its own: whoever buys is a business row and an activity in it."""

import sqlite3
from contextlib import closing

import pytest
from click.testing import CliRunner

from perqueue.cli import main
from tests.embedded.patience import be_patient
from tests.helpers import environment


@pytest.fixture(params=["delete", "wal"])
def mode(request):
    """The journal mode that the application has chosen."""
    return request.param


@pytest.fixture
def app(tmp_path, mode):
    """The application's database, as it was before anybody thought of perqueue."""
    path = tmp_path / "app.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA journal_mode = {mode}")
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL)")
        connection.commit()
    return path


@pytest.fixture
def embed(app, make_queue):
    """Make queues in the application's database, all closed when the test ends."""
    return lambda path=app, **given: make_queue(path, embedded=True, **given)


@pytest.fixture
def queue(embed):
    """A queue in the application's database, which delivers."""
    return embed()


@pytest.fixture
def patient(monkeypatch):
    """Wait for locks for longer than a second."""
    be_patient(monkeypatch.setattr)


@pytest.fixture
def connect(app):
    """Connect to the application's database as applications do: `connect()`; closed when the test ends."""
    connections = []

    def make(path=app, **given):
        connection = sqlite3.connect(path, **given)
        connections.append(connection)
        return connection

    yield make
    for connection in connections:
        connection.close()


@pytest.fixture
def buy():
    """Sell to a customer, within whatever transaction is open: a business row, and its activity."""

    def sell(queue, connection, customer):
        connection.execute("INSERT INTO orders (customer) VALUES (?)", (customer,))
        return queue.record("SHOP", customer, connection=connection)

    return sell


@pytest.fixture
def customers(app):
    """Return who has bought, by the committed business rows."""

    def read():
        with closing(sqlite3.connect(app)) as connection:
            return {name for (name,) in connection.execute("SELECT customer FROM orders")}

    return read


@pytest.fixture
def billed(per):
    """Return who was billed, by what Per has accepted."""
    return lambda: {activity.user_id for activity in per.activities}


@pytest.fixture
def perqueue(app, per):
    """Run the command in this process: `perqueue("status", "--json")`."""
    env = environment(app, per, PER_REPORTING_TOKEN=per.reporting_token)

    def run(*arguments):
        result = CliRunner().invoke(main, [str(each) for each in arguments], env=env)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
