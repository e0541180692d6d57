"""`record(connection=...)` on connections to PostgreSQL: the activity exists exactly when the order does."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import timedelta
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from perqueue import ConfigurationError, OutboxError, OutboxFull, PerQueueError
from tests.helpers import Child, environment

ORDER = "INSERT INTO orders (customer) VALUES ('{}')"


@pytest.fixture
def app(sql, outbox):
    """The application's table, in the schema in which the outbox will be."""
    sql("CREATE TABLE orders (customer text)")
    return outbox


@pytest.fixture
def queue(app, make_queue):
    return make_queue(app)


@pytest.fixture
def customers(sql):
    """Return the customers with a committed order."""
    return lambda: {row[0] for row in sql("SELECT customer FROM orders")}


@pytest.fixture
def billed(per):
    """Return the customers that Per has."""
    return lambda: {activity.user_id for activity in per.activities}


def psycopg_connection(url, queue):
    with psycopg.connect(url) as connection:
        for customer, end in (("UNDONE", connection.rollback), ("DONE", connection.commit)):
            connection.execute(ORDER.format(customer))
            queue.record("SHOP", customer, connection=connection)
            end()


def psycopg_with_rows_of_its_own(url, queue):
    with psycopg.connect(url, row_factory=dict_row, prepare_threshold=0) as connection:
        for customer in ("DONE", "UNDONE"):
            connection.execute(ORDER.format(customer))
            queue.record("SHOP", customer, connection=connection)
            connection.commit() if customer == "DONE" else connection.rollback()


def psycopg_in_blocks(url, queue):
    with psycopg.connect(url, autocommit=True) as connection, connection.transaction():
        connection.execute(ORDER.format("DONE"))
        queue.record("SHOP", "DONE", connection=connection)
        with connection.transaction(force_rollback=True):
            connection.execute(ORDER.format("UNDONE"))
            queue.record("SHOP", "UNDONE", connection=connection)


def psycopg_async(url, queue):
    async def work():
        async with await psycopg.AsyncConnection.connect(url) as connection:
            for customer, end in (("UNDONE", connection.rollback), ("DONE", connection.commit)):
                await connection.execute(ORDER.format(customer))
                await queue.arecord("SHOP", customer, connection=connection)
                await end()

    asyncio.run(work())


def sqlalchemy_session(url, queue, driver="psycopg"):
    engine = create_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
    with Session(engine) as session:
        for customer, end in (("UNDONE", session.rollback), ("DONE", session.commit)):
            session.execute(text(ORDER.format(customer)))
            queue.record("SHOP", customer, connection=session)
            end()
    engine.dispose()


def sqlalchemy_with_psycopg2(url, queue):
    sqlalchemy_session(url, queue, "psycopg2")


def sqlalchemy_async(url, queue, driver="psycopg"):
    async def work():
        settings, address = {}, url.replace("postgresql:", f"postgresql+{driver}:")
        if driver == "asyncpg":  # which takes no libpq options
            address, _, schema = address.partition("?options=-csearch_path%3D")
            settings = {"connect_args": {"server_settings": {"search_path": schema}}}
        engine = create_async_engine(address, **settings)
        async with AsyncSession(engine) as session:
            for customer, end in (("UNDONE", session.rollback), ("DONE", session.commit)):
                await session.execute(text(ORDER.format(customer)))
                await queue.arecord("SHOP", customer, connection=session)
                await end()
        await engine.dispose()

    asyncio.run(work())


def sqlalchemy_with_asyncpg(url, queue):
    sqlalchemy_async(url, queue, "asyncpg")


@pytest.mark.parametrize("coalesce", [None, timedelta(days=1)], ids=["each", "coalesced"])
@pytest.mark.parametrize(
    "work",
    [
        psycopg_connection,
        psycopg_with_rows_of_its_own,
        psycopg_in_blocks,
        psycopg_async,
        sqlalchemy_session,
        sqlalchemy_with_psycopg2,
        sqlalchemy_async,
        sqlalchemy_with_asyncpg,
    ],
    ids=lambda work: work.__name__,
)
def test_committed_with_the_order_and_rolled_back_with_it(app, make_queue, customers, billed, work, coalesce):
    """Whatever library runs the transaction: what is rolled back was never recorded."""
    queue = make_queue(app, coalesce=coalesce)
    work(app, queue)
    queue.flush(10)
    assert billed() == customers() == {"DONE"}
    assert (queue.stats().delivered, queue.stats().pending) == (1, 0)


def test_django(app, per, sql, billed):
    """Django's own connection: an activity is part of the atomic block that it is recorded in."""
    url = urlsplit(app)
    script = f"""
        import django
        from django.conf import settings
        from django.db import connection, transaction

        settings.configure(DATABASES={{"default": {{
            "ENGINE": "django.db.backends.postgresql", "NAME": "{url.path[1:]}", "HOST": "{url.hostname}",
            "PORT": "{url.port}", "USER": "{url.username}", "PASSWORD": "{url.password}",
            "OPTIONS": {{"options": "-csearch_path={app.rpartition("%3D")[2]}"}},
        }}}})
        django.setup()
        queue = PerQueue()
        def buy(customer):
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO orders (customer) VALUES (%s)", [customer])
            queue.record("SHOP", customer, connection=connection)
        buy("AT_ONCE")
        for customer in ("DONE", "UNDONE"):
            with transaction.atomic():
                buy(customer)
                transaction.set_rollback(customer == "UNDONE")
        queue.flush(10)
    """
    with Child(script, env=environment(app, per)) as child:
        child.succeed(30)
    assert billed() == {row[0] for row in sql("SELECT customer FROM orders")} == {"AT_ONCE", "DONE"}


def test_nothing_is_delivered_before_the_commit_and_sleepers_are_woken_by_it(
    queue, app, per, monkeypatch, until
):
    """An open transaction's activity reaches nobody; its commit wakes a drainer that was asleep."""
    from perqueue._outbox.postgres import leases

    monkeypatch.setattr(leases, "_LOOK_ASLEEP", 3600.0)  # so that only the notification can do it
    queue.record("SHOP", "FIRST")
    queue.flush(10)
    until(lambda: queue._outbox._asleep and queue._outbox._look_at > 1000, timeout=20)
    with psycopg.connect(app) as connection:
        queue.record("SHOP", "LATER", connection=connection)
        assert per.accepted == 1
        connection.commit()
    per.wait_for(2, timeout=5)


def test_a_coalesced_one_keeps_nobody_waiting(app, make_queue, per):
    """While a transaction has recorded a user, others record that user at once, joined or not."""
    queue = make_queue(app, drain=False, coalesce=timedelta(days=1))
    with psycopg.connect(app) as open_one, psycopg.connect(app) as another:
        for connection in (open_one, another):
            connection.execute("SET statement_timeout = '2s'")
            queue.record("SHOP", "USER", connection=connection)
        queue.record("SHOP", "USER")
        another.commit()
        open_one.rollback()
    assert queue.stats().pending == 2  # which bills what one does
    queue.record("SHOP", "USER")
    with psycopg.connect(app) as connection:
        first = queue.record("SHOP", "OTHER", connection=connection).id
        assert queue.record("SHOP", "OTHER", connection=connection).id == first
    queue.record("SHOP", "OTHER")
    with psycopg.connect(app) as connection:
        assert queue.record("SHOP", "OTHER", connection=connection).id == first
    assert queue.stats().pending in (3, 4)  # the plain one of USER stood for nothing while another was open


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("coalesce", [None, timedelta(days=1)], ids=["each", "coalesced"])
def test_isolation_levels(app, make_queue, level, coalesce):
    """A transaction that sees only what was there when it began can record what others have since."""
    queue = make_queue(app, drain=False, coalesce=coalesce)
    with psycopg.connect(app) as connection:
        connection.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        connection.execute("SELECT count(*) FROM orders").fetchone()
        queue.record("SHOP", "USER")
        queue.record("SHOP", "USER", connection=connection)
    assert queue.stats().pending == 2


def test_another_search_path(app, make_queue, sql, per, database):
    """The application's own search path need not have the outbox's schema in it."""
    for coalesce in (None, timedelta(days=1)):
        queue = make_queue(app, coalesce=coalesce)
        with psycopg.connect(app.partition("?")[0]) as connection:
            queue.record("SHOP", f"USER_{coalesce}", connection=connection)
    queue.flush(10)
    assert per.accepted == 2


def test_a_connection_elsewhere_is_refused_and_stays_usable(queue, app, database, sql, per):
    """To another database, another outbox or SQLite: nothing is recorded, and the transaction goes on."""
    database.sql("CREATE DATABASE elsewhere")
    url = f"{app.partition('?')[0].rpartition('/')[0]}/elsewhere"
    with psycopg.connect(url) as connection:
        with pytest.raises(ConfigurationError, match="another database"):
            queue.record("SHOP", "USER", connection=connection)
        assert connection.execute("SELECT 1").fetchone() == (1,)
    with (
        closing(sqlite3.connect(":memory:")) as other,
        pytest.raises(ConfigurationError, match="a sqlite database"),
    ):
        queue.record("SHOP", "USER", connection=other)
    with psycopg.connect(app) as connection:
        sql("UPDATE perqueue_outbox SET outbox_id = 'ANOTHER'")
        with pytest.raises(ConfigurationError, match="another database"):
            queue.record("SHOP", "USER", connection=connection)
    assert queue.stats().pending == 0


def test_the_wrong_kind_of_call_names_the_right_one(queue, app):
    """record() takes no connection that is awaited, and arecord() none that is not."""

    async def work():
        async with await psycopg.AsyncConnection.connect(app) as connection:
            with pytest.raises(ConfigurationError, match=r"await queue\.arecord"):
                queue.record("SHOP", "USER", connection=connection)
        with psycopg.connect(app) as plain, pytest.raises(ConfigurationError, match=r"queue\.record"):
            await queue.arecord("SHOP", "USER", connection=plain)

    asyncio.run(work())


def test_errors_say_what_to_do_and_show_no_ids(queue, app):
    """In a failed transaction, or on a closed connection, nothing is recorded, and it is said why."""
    with psycopg.connect(app) as connection:
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT nonsense")
        with pytest.raises(OutboxError, match="rolled back: current transaction is aborted") as caught:
            queue.record("SHOP", "SECRET_USER", connection=connection)
        assert caught.value.activity.user_id == "SECRET_USER"
        assert "SECRET_USER" not in str(caught.value)
        connection.rollback()
    with pytest.raises(OutboxError, match="closed"):
        queue.record("SHOP", "USER", connection=connection)


def test_max_pending_and_receipts(app, make_queue):
    """A full outbox refuses, and the transaction can go on; a receipt has an ID and nothing to wait for."""
    queue = make_queue(app, drain=False, max_pending=1)
    with psycopg.connect(app) as connection:
        receipt = queue.record("SHOP", "USER", connection=connection)
        assert receipt.id > 0
        with pytest.raises(PerQueueError, match="transaction"):
            receipt.wait(None)
        connection.commit()
        with pytest.raises(OutboxFull, match="max_pending is 1"):
            queue.record("SHOP", "TOO_MANY", connection=connection)
        connection.execute(ORDER.format("USER"))
    assert queue.stats().pending == 1


def test_an_application_role_needs_few_rights(app, make_queue, database, sql):
    """A role may record with what docs/postgresql.md grants it, and with nothing else."""
    queue = make_queue(app, drain=False)
    schema = app.rpartition("%3D")[2]
    with psycopg.connect(app) as connection:
        connection.execute("CREATE ROLE shop")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO shop")
        connection.execute("SET LOCAL ROLE shop")
        with pytest.raises(ConfigurationError, match="permission denied"):
            queue.record("SHOP", "USER", connection=connection)
        connection.rollback()
        connection.execute("CREATE ROLE shop")
        connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO shop")
        connection.execute("GRANT SELECT ON perqueue_outbox, perqueue_drainer TO shop")
        connection.execute("GRANT INSERT, SELECT (id) ON perqueue_pending TO shop")
        connection.execute("SET LOCAL ROLE shop")
        queue.record("SHOP", "USER", connection=connection)
        connection.execute("RESET ROLE")
        connection.execute("DROP OWNED BY shop")
        connection.execute("DROP ROLE shop")
    assert queue.stats().pending == 1


def by_psycopg(url, record):
    with psycopg.connect(url) as connection:
        connection.tpc_begin(connection.xid(1, "psycopg", "perqueue"))
        record(connection)
        connection.tpc_prepare()
        connection.tpc_commit()


def by_sqlalchemy(url, record, driver="psycopg"):
    engine = create_engine(url.replace("postgresql:", f"postgresql+{driver}:"))
    with engine.connect() as connection, connection.begin_twophase() as transaction:
        record(connection)
        transaction.prepare()
        transaction.commit()
    with Session(engine, twophase=True) as session:
        record(session)
        session.prepare()
        session.commit()
    engine.dispose()


def by_psycopg2(url, record):
    by_sqlalchemy(url, record, "psycopg2")


@pytest.mark.parametrize("work", [by_psycopg, by_sqlalchemy, by_psycopg2], ids=lambda work: work.__name__)
def test_a_transaction_that_is_prepared_can_be_while_drainers_sleep(mortal, make_queue, work):
    """Two-phase commits work though a drainer sleeps, which PostgreSQL lets no prepared transaction wake."""
    mortal.ensure_started()
    mortal.sql("DROP SCHEMA IF EXISTS prepared CASCADE", "CREATE SCHEMA prepared")
    url = f"{mortal.url}?options=-csearch_path%3Dprepared"
    queue = make_queue(url, drain=False)
    mortal.sql(
        "INSERT INTO prepared.perqueue_drainer (owner, host, pid, alive_until, asleep)"
        " VALUES (1, 'elsewhere', 1, clock_timestamp() + interval '15 seconds', true)"
    )
    recorded = []
    work(url, lambda connection: recorded.append(queue.record("SHOP", "USER", connection=connection)))
    assert queue.stats().pending == len(recorded) > 0


@pytest.mark.parametrize("name", ["it's", "100%s", "what?", 'a "b" \\c', "{x}"])
def test_a_schema_of_any_name(database, make_queue, per, name):
    """Whatever the outbox's schema is called, plain and joined recording and looks at max_pending work."""
    quoted = '"' + name.replace('"', '""') + '"'
    database.sql(f"CREATE SCHEMA {quoted}")
    path = quoted.replace("\\", "\\\\").replace(" ", "\\ ")
    url = f"{database.url}?options={quote('-csearch_path=' + path, safe='')}"
    for coalesce in (None, timedelta(days=1)):
        queue = make_queue(url, coalesce=coalesce, max_pending=100)
        queue.record("SHOP", "PLAIN")
        with psycopg.connect(database.url) as connection:
            queue.record("SHOP", "JOINED", connection=connection)
    queue.flush(10)
    assert per.accepted == 4


def test_a_cursor_class_and_a_pipeline_of_the_applications_own(app, queue, sql):
    """What the application has set for its own statements on a connection does not concern ours."""
    with psycopg.connect(app, cursor_factory=psycopg.RawCursor) as connection:
        queue.record("SHOP", "RAW", connection=connection)
    with psycopg.connect(app) as connection, connection.pipeline():
        queue.record("SHOP", "PIPELINE", connection=connection)

    async def work():
        async with await psycopg.AsyncConnection.connect(
            app, cursor_factory=psycopg.AsyncRawCursor
        ) as connection:
            await queue.arecord("SHOP", "ASYNC", connection=connection)

    asyncio.run(work())
    queue.flush(10)
    assert queue.stats().delivered == 3
