"""SQLAlchemy's sessions and connections, plain and async, and aiosqlite by itself."""

import asyncio
import sqlite3
import sys
import time
import traceback
from contextlib import asynccontextmanager, closing
from datetime import timedelta

import aiosqlite
import pytest
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from perqueue import ConfigurationError, OutboxError

AUTOCOMMIT = [{"isolation_level": None}, *([{"autocommit": True}] if sys.version_info >= (3, 12) else [])]
ORDER = text("INSERT INTO orders (customer) VALUES (:customer)")


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[str]


@pytest.fixture
def engine(app):
    engine = create_engine(f"sqlite:///{app}")
    yield engine
    engine.dispose()


def has_savepoints(engine):
    """Have SQLAlchemy begin transactions itself, as its documentation asks for where savepoints are used."""

    @event.listens_for(engine, "connect")
    def connect(connection, _):
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection):
        connection.exec_driver_sql("BEGIN")


@pytest.mark.parametrize("kind", ["Session", "scoped_session"])
def test_a_session_commits_its_orders_with_their_activities(queue, engine, customers, billed, kind):
    """Objects that are not even flushed, and their activities, are one transaction: all of it or nothing."""
    session = Session(engine) if kind == "Session" else scoped_session(sessionmaker(engine))
    for name, ends in (("UNDONE", session.rollback), ("DONE", session.commit), ("CLOSED", session.close)):
        session.add(Order(customer=name))
        queue.record("SHOP", name, connection=session)
        ends()
    queue.flush(10)
    assert billed() == customers() == {"DONE"}
    session.close()


def test_a_session_that_only_records_commits_that(queue, engine, billed):
    """The session knows of the transaction: its commit is one, though no other statement was run."""
    with Session(engine) as session, session.begin():
        queue.record("SHOP", "CUSTOMER", connection=session)
    with engine.begin() as connection:
        queue.record("SHOP", "ANOTHER", connection=connection)
    with engine.connect() as connection:
        queue.record("SHOP", "UNDONE", connection=connection)
    queue.flush(10)
    assert billed() == {"CUSTOMER", "ANOTHER"}


def test_a_nested_transaction_takes_its_activities_with_it(queue, engine, customers, billed):
    """What is rolled back to a savepoint is gone, of a session and of a connection."""
    has_savepoints(engine)
    with Session(engine) as session, session.begin():
        for name, ends in (("UNDONE", "rollback"), ("DONE", "commit")):
            nested = session.begin_nested()
            session.add(Order(customer=name))
            queue.record("SHOP", name, connection=session)
            getattr(nested, ends)()
    with engine.begin() as connection:
        nested = connection.begin_nested()
        connection.execute(ORDER, {"customer": "UNDONE_TOO"})
        queue.record("SHOP", "UNDONE_TOO", connection=connection)
        nested.rollback()
    queue.flush(10)
    assert billed() == customers() == {"DONE"}


def test_autocommit_commits_at_once(queue, engine, billed):
    """With SQLAlchemy's AUTOCOMMIT there is no transaction to be part of."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        queue.record("SHOP", "CUSTOMER", connection=connection)
        queue.flush(10)
    assert billed() == {"CUSTOMER"}


STYLES = ["qmark", "named", "numeric"]
if sys.version_info >= (3, 12):
    STYLES.remove("numeric")  # of which sqlite3 warns itself, and which it refuses from 3.14 on


@pytest.mark.parametrize("style", STYLES)
def test_an_engine_may_mark_values_in_its_own_way(embed, app, style):
    """SQLAlchemy's `paramstyle` is about SQLAlchemy's statements."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    engine = create_engine(f"sqlite:///{app}", paramstyle=style)
    with engine.begin() as connection:
        connection.execute(ORDER, {"customer": "CUSTOMER"})
        queue.record("SHOP", "CUSTOMER", connection=connection)
    engine.dispose()
    assert queue.stats().pending == 1


def test_a_session_wakes_the_drain_when_it_has_committed(embed, engine):
    """Whoever delivers in this process hears of the commit at once, and is heard of no more after close()."""
    queue = embed(drain=False)
    heard = []
    queue._committed = lambda *_: heard.append(1)
    with Session(engine) as session:
        for n in range(3):
            queue.record("SHOP", f"CUSTOMER_{n}", connection=session)
            queue.record("SHOP", f"CUSTOMER_{n}", connection=session)
            assert len(heard) == n
            session.commit()
        assert len(heard) == 3


def test_errors_are_ours_and_tell_no_ids(queue, engine, connect):
    """SQLAlchemy's text holds all values; neither it nor its exception is in what comes out."""
    holder = connect()
    holder.execute("BEGIN IMMEDIATE")
    hasty = create_engine(engine.url, connect_args={"timeout": 0})
    with Session(hasty) as session:
        customer = f"CUSTOMER_{7}"  # not in the source, which a traceback shows
        with pytest.raises(OutboxError, match="database is locked") as caught:
            queue.record("SHOP", customer, connection=session)
        shown = "".join(traceback.format_exception(caught.value))
        assert customer not in shown
        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    hasty.dispose()
    holder.rollback()
    closed = engine.connect()
    closed.close()
    with pytest.raises(ConfigurationError, match="closed"):
        queue.record("SHOP", "CUSTOMER", connection=closed)
    with Session() as unbound, pytest.raises(ConfigurationError, match="cannot be used"):
        queue.record("SHOP", "CUSTOMER", connection=unbound)
    with pytest.raises(ConfigurationError, match="Engine, is none of"):
        queue.record("SHOP", "CUSTOMER", connection=engine)


def test_another_database_is_refused(queue, tmp_path):
    """The engine of another file is refused before anything is written there."""
    other = create_engine(f"sqlite:///{tmp_path / 'other.db'}")
    with Session(other) as session, pytest.raises(ConfigurationError, match=r"other\.db"):
        queue.record("SHOP", "CUSTOMER", connection=session)
    other.dispose()


class AnotherLibrarys:
    """A connection that is not Python's own, as pysqlite3's or SQLCipher's are."""

    def __init__(self, path):
        self._connection = sqlite3.connect(path)

    def __getattr__(self, name):
        return getattr(self._connection, name)


def test_a_connection_of_another_sqlite_library_is_refused(queue, app):
    """By SQLAlchemy too: neither library would see the other's locks on the file."""
    engine = create_engine("sqlite://", creator=lambda: AnotherLibrarys(app))
    with Session(engine) as session, pytest.raises(ConfigurationError, match="another SQLite library"):
        queue.record("SHOP", "CUSTOMER", connection=session)
    engine.dispose()


# -- async


@asynccontextmanager
async def async_engine(app):
    engine = create_async_engine(f"sqlite+aiosqlite:///{app}")
    try:
        yield engine
    finally:
        await engine.dispose()


@pytest.mark.parametrize("kind", ["AsyncSession", "async_scoped_session"])
def test_an_async_session(queue, app, customers, billed, kind):
    """`await arecord(connection=session)` is part of the session's transaction."""

    async def sell():
        async with async_engine(app) as engine:
            session = AsyncSession(engine)
            if kind == "async_scoped_session":
                session = async_scoped_session(async_sessionmaker(engine), asyncio.current_task)
            for name, ends in (("UNDONE", session.rollback), ("DONE", session.commit)):
                session.add(Order(customer=name))
                await queue.arecord("SHOP", name, connection=session)
                await ends()
            await session.close()
        await queue.aflush(10)

    asyncio.run(sell())
    assert billed() == customers() == {"DONE"}


def test_an_async_connection(queue, app, customers, billed):
    """The same with an AsyncConnection."""

    async def sell():
        async with async_engine(app) as engine:
            async with engine.begin() as connection:
                await connection.execute(ORDER, {"customer": "DONE"})
                await queue.arecord("SHOP", "DONE", connection=connection)
            async with engine.connect() as connection:
                await connection.execute(ORDER, {"customer": "UNDONE"})
                await queue.arecord("SHOP", "UNDONE", connection=connection)
        await queue.aflush(10)

    asyncio.run(sell())
    assert billed() == customers() == {"DONE"}


def test_aiosqlite_by_itself(queue, app, customers, billed):
    """The same with aiosqlite's own connection, whatever its rows are; a closed one is refused."""

    async def sell():
        async with aiosqlite.connect(app) as connection:
            connection.row_factory = aiosqlite.Row
            for name, ends in (("UNDONE", connection.rollback), ("DONE", connection.commit)):
                await connection.execute("INSERT INTO orders (customer) VALUES (?)", (name,))
                await queue.arecord("SHOP", name, connection=connection)
                await ends()
        with pytest.raises(ConfigurationError):
            await queue.arecord("SHOP", "CUSTOMER", connection=connection)
        await queue.aflush(10)

    asyncio.run(sell())
    assert billed() == customers() == {"DONE"}


@pytest.mark.parametrize("manner", AUTOCOMMIT, ids=str)
def test_aiosqlite_in_autocommit_mode(embed, app, manner):
    """Where each statement would be committed by itself an activity and its window are together."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    ran = []

    async def sell():
        async with aiosqlite.connect(app, **manner) as connection:
            await connection.set_trace_callback(ran.append)
            await queue.arecord("SHOP", "CUSTOMER", connection=connection)
            assert not connection.in_transaction

    asyncio.run(sell())
    assert [each for each in ran if each in {"BEGIN IMMEDIATE", "COMMIT"}] == ["BEGIN IMMEDIATE", "COMMIT"]
    assert queue.stats().pending == 1


def test_a_cancelled_arecord_leaves_no_transaction_open(embed, app):
    """Cancelled between an activity and its window, in autocommit mode: neither is there."""
    queue = embed(coalesce=timedelta(days=1), drain=False)

    async def sell():
        async with aiosqlite.connect(app, isolation_level=None) as connection:
            for moment in range(60):  # more than a call has steps of the event loop
                task = asyncio.ensure_future(queue.arecord("SHOP", f"{moment}", connection=connection))
                for _ in range(moment):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                assert not connection.in_transaction

    asyncio.run(sell())
    with closing(sqlite3.connect(app)) as connection:
        alone = (
            "SELECT count(*) FROM perqueue_activity WHERE id NOT IN"
            " (SELECT activity_id FROM perqueue_coalesced)"
        )
        assert connection.execute(alone).fetchone() == (0,)


def test_the_wrong_method_is_named_with_the_right_one(queue, app, engine, connect):
    """An awaited connection in record(), or the other way round, is refused: no await can be forgotten."""

    async def mistake():
        async with async_engine(app) as awaited, AsyncSession(awaited) as session:
            with pytest.raises(ConfigurationError, match=r"await queue\.arecord"):
                queue.record("SHOP", "CUSTOMER", connection=session)
        with pytest.raises(ConfigurationError, match=r"not awaited: queue\.record"):
            await queue.arecord("SHOP", "CUSTOMER", connection=connect())
        with Session(engine) as session, pytest.raises(ConfigurationError, match=r"not awaited"):
            await queue.arecord("SHOP", "CUSTOMER", connection=session)
        with pytest.raises(ConfigurationError, match="is none of"):
            await queue.arecord("SHOP", "CUSTOMER", connection=object())

    asyncio.run(mistake())
    assert queue.stats().pending == 0


def test_arecord_lets_the_other_coroutine_commit(queue, app, billed):
    """While it waits for a lock the loop goes on, so that the coroutine that holds it can let go."""

    async def holds(session, waits):
        session.add(Order(customer="HELD"))
        await session.flush()
        waits.set()
        await asyncio.sleep(0.1)
        await session.commit()

    async def sell():
        async with async_engine(app) as engine, AsyncSession(engine) as session:
            waits = asyncio.Event()
            other = asyncio.create_task(holds(session, waits))
            await waits.wait()
            began = time.monotonic()
            receipt = await queue.arecord("SHOP", "CUSTOMER")
            assert time.monotonic() - began < 1.0
            await other
            await receipt

    asyncio.run(sell())
    assert billed() == {"CUSTOMER"}
