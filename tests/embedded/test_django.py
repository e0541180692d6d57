"""Django's own connection: in a process of its own, because Django is configured once for each."""

import pytest

from tests.helpers import Child, environment

DJANGO = """
    import django
    from django.conf import settings
    from django.db import connection, connections, models, transaction

    app = os.environ["PERQUEUE_OUTBOX"]
    wal = {"init_command": "PRAGMA journal_mode=wal"} if len(sys.argv) > 1 and sys.argv[1] == "wal" else {}
    settings.configure(
        DEBUG=False,
        USE_TZ=True,
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": app, "OPTIONS": wal},
            "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": app + "-other"},
        },
    )
    django.setup()

    class Order(models.Model):
        customer = models.TextField()

        class Meta:
            app_label = "shop"
            db_table = "orders"

    queue = PerQueue(embedded=True)

    def buy(customer):
        Order.objects.create(customer=customer)
        return queue.record("SHOP", customer, connection=connection)
"""


@pytest.fixture
def django(app, per, mode):
    def run(script):
        with Child(DJANGO + script, mode, env=environment(app, per)) as child:
            return child.succeed(30)

    return run


def test_atomic_blocks(django, customers, billed):
    """An activity is part of the atomic block that it is recorded in, nested or not, and of nothing else."""
    django("""
    buy("AT_ONCE")
    with transaction.atomic():
        buy("DONE")
        try:
            with transaction.atomic():
                buy("UNDONE_NESTED")
                raise ValueError
        except ValueError:
            pass
        with transaction.atomic():
            buy("DONE_NESTED")
    try:
        with transaction.atomic():
            buy("UNDONE")
            raise ValueError
    except ValueError:
        pass
    with transaction.atomic():
        buy("ROLLED_BACK")
        transaction.set_rollback(True)
    connections["default"].set_autocommit(False)
    buy("BY_HAND")
    connection.commit()
    buy("UNDONE_BY_HAND")
    connection.rollback()
    connection.set_autocommit(True)
    with queue:
        pass
    """)
    assert billed() == customers() == {"AT_ONCE", "DONE", "DONE_NESTED", "BY_HAND"}


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_the_drain_is_woken_after_the_commit(django):
    """By Django's on_commit: not before, and not after a rollback."""
    said = django("""
    heard = []
    queue._committed = lambda *_: heard.append(1)
    with transaction.atomic():
        buy("DONE")
        say(len(heard))
    say(len(heard))
    with transaction.atomic():
        buy("UNDONE")
        transaction.set_rollback(True)
    say(len(heard))
    queue.close()
    """)
    assert said == ["0", "1", "1"]


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_what_cannot_be_joined_is_told(django):
    """Another database, a broken transaction, a lock: our exceptions, without the IDs."""
    said = django("""
    import sqlite3
    def refused(**given):
        try:
            queue.record("SHOP", "CUSTOMER", **given)
        except PerQueueError as error:
            say((type(error).__name__, type(error.__cause__).__module__, "CUSTOMER" in str(error)))
    refused(connection=connections["other"])
    wrapper = connections["default"]
    thread = threading.Thread(target=refused, kwargs={"connection": wrapper})
    thread.start()
    thread.join()
    try:
        with transaction.atomic():
            try:
                with transaction.atomic():
                    connection.cursor().execute("INSERT INTO orders (nothing) VALUES (1)")
            finally:
                transaction.set_rollback(True)
                refused(connection=connection)
    except django.db.Error:
        pass
    connection.cursor().execute("PRAGMA busy_timeout = 0")
    holder = sqlite3.connect(app, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    refused(connection=connection)
    holder.execute("ROLLBACK")
    queue.close()
    """)
    assert said == [
        "('ConfigurationError', 'builtins', False)",
        "('ConfigurationError', 'django.db.utils', False)",
        "('ConfigurationError', 'django.db.transaction', False)",
        "('OutboxError', 'sqlite3', False)",
    ]


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_makemigrations_proposes_nothing_for_perqueues_tables(django):
    """Django looks at models, not at tables: there is nothing to exclude."""
    said = django("""
    from django.db.migrations.autodetector import MigrationAutodetector
    from django.db.migrations.loader import MigrationLoader
    from django.db.migrations.state import ProjectState
    loader = MigrationLoader(connection)
    changes = MigrationAutodetector(loader.project_state(), ProjectState.from_apps(django.apps.apps)).changes(
        graph=loader.graph
    )
    say([each for each in str(changes).split() if "perqueue" in each])
    queue.close()
    """)
    assert said == ["[]"]
