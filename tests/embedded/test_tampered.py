"""Migrations and teardowns of the application's that do not spare perqueue's tables, and those that do."""

import sqlite3
from contextlib import closing

import pytest

from perqueue import OutboxError
from tests.helpers import Child, environment

TABLES = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'perqueue%'"


def tables(path):
    with closing(sqlite3.connect(path)) as connection:
        return {name for (name,) in connection.execute(TABLES)}


def each_table(path, statement, *, but=""):
    names = tables(path) - {but}
    with closing(sqlite3.connect(path, timeout=20)) as connection, connection:
        for name in names:
            connection.execute(statement.format(name))


CALLS = {
    "record": lambda queue, _: queue.record("SHOP", "CUSTOMER"),
    "join": lambda queue, connection: queue.record("SHOP", "CUSTOMER", connection=connection),
    "stats": lambda queue, _: queue.stats(),
    "flush": lambda queue, _: queue.flush(1),
}


@pytest.mark.parametrize(
    ("statement", "but"),
    [("DROP TABLE {}", ""), ("DROP TABLE {}", "perqueue_migrations"), ("DELETE FROM {}", "")],
)
def test_what_is_gone_altogether_is_said_and_made_anew(embed, app, connect, billed, statement, but):
    """Whoever has the queue open is told what has happened, and the next start begins with new tables."""
    queue = embed(drain=False)
    queue.record("SHOP", "LOST")
    names = tables(app)
    each_table(app, statement, but=but)
    connection = connect(timeout=20)
    for call in CALLS.values():
        with pytest.raises(
            OutboxError, match=r"another program has dropped.*spare what begins with perqueue_"
        ):
            call(queue, connection)
        connection.rollback()
    queue.close()
    again = embed()
    assert tables(app) == names
    again.record("SHOP", "FIRST")
    with connection:
        again.record("SHOP", "SECOND", connection=connection)
    again.flush(10)
    assert billed() == {"FIRST", "SECOND"}


@pytest.mark.parametrize(
    "statement",
    ["DROP TABLE perqueue_drain", "ALTER TABLE perqueue_drain RENAME TO drain", "DELETE FROM perqueue_drain"],
)
def test_what_is_left_is_not_thrown_away(embed, app, statement):
    """Where some of the tables still hold something they stay, and every start says what is wrong."""
    embed(drain=False).record("SHOP", "KEPT")
    with closing(sqlite3.connect(app, timeout=20)) as connection, connection:
        connection.execute(statement)
    with pytest.raises(OutboxError, match="another program has dropped"):
        embed()
    with closing(sqlite3.connect(app)) as connection:
        assert connection.execute("SELECT user_id FROM perqueue_activity").fetchall() == [("KEPT",)]


FLUSH = """
    import django
    from django.conf import settings
    from django.core.management import call_command

    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["PERQUEUE_OUTBOX"]}
    settings.configure(
        DATABASES={"default": database}, INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"]
    )
    django.setup()
    call_command("migrate", verbosity=0)
    with PerQueue(embedded=True, drain=False) as queue:
        queue.record("SHOP", "KEPT")
        call_command("flush", interactive=False, verbosity=0)
        say(queue.stats().pending)
"""


def test_djangos_flush_leaves_the_tables_alone(app, per):
    """`manage.py flush`, and so the teardown of TransactionTestCase, empties the tables of models only."""
    pytest.importorskip("django")
    with Child(FLUSH, env=environment(app, per)) as child:
        assert child.succeed(60) == ["1"]
