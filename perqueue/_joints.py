"""The libraries whose connections can be joined, seen as what it takes to run a statement there.

None of them is imported here: whoever passes a connection has imported its library.
"""

from __future__ import annotations

import functools
import sqlite3
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from perqueue.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable


class Joint(Protocol):
    """A connection, seen as what it takes to join its transaction."""

    dialect: str
    driven: Any
    """The connection of the driver itself."""

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        """Run a statement in the open transaction, beginning one as the library does, and return all rows."""

    def when_committed(self, call: Callable[..., object]) -> None:
        """Have it called after the commit, if the library can."""


class AsyncJoint(Protocol):
    dialect: str
    driven: Any

    async def prepare(self) -> None:
        """Find out what can only be asked of the driver itself."""

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]: ...


def commits_each(joint: Joint | AsyncJoint) -> bool:
    """Tell whether a statement on a connection of sqlite3's or aiosqlite's would now commit itself."""
    driven = joint.driven
    if getattr(driven, "in_transaction", True):  # psycopg's has none: its backend's steps are one statement
        return False
    if isinstance(joint, _Aiosqlite):
        return joint.autocommit is True or driven.isolation_level is None
    return driven.isolation_level is None or getattr(driven, "autocommit", None) is True


def is_two_phase(joint: Joint | AsyncJoint) -> bool:
    """Tell whether the transaction is to be prepared before it is committed."""
    if isinstance(joint, _SQLAlchemy):
        return joint.is_two_phase()
    return getattr(joint.driven, "_tpc", None) is not None  # psycopg's; it tells nobody


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a module, as far as it is loaded."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def joint_of(connection: Any) -> Joint:
    if isinstance(connection, sqlite3.Connection):
        return _SQLite(connection)
    if isinstance(connection, _loaded("sqlalchemy.orm", "scoped_session")):
        connection = connection()
    if isinstance(connection, _loaded("sqlalchemy.orm", "Session")):
        return _SQLAlchemySession(connection)
    if isinstance(connection, _loaded("sqlalchemy", "Connection")):
        return _SQLAlchemy(connection)
    if "django" in sys.modules and hasattr(connection, "vendor") and hasattr(connection, "on_commit"):
        return _Django(connection)
    if isinstance(connection, _loaded("psycopg", "Connection")):
        return _Psycopg(connection)
    if sqlalchemy_run_sync(connection) or isinstance(connection, _raw_async()):
        raise _refusal(connection, "is awaited: await queue.arecord(..., connection=...)")
    raise _refusal(connection)


def async_joint_of(connection: Any) -> AsyncJoint:
    if isinstance(connection, _loaded("aiosqlite", "Connection")):
        return _Aiosqlite(connection)
    if isinstance(connection, _loaded("psycopg", "AsyncConnection")):
        return _AsyncPsycopg(connection)
    try:
        joint_of(connection)
    except ConfigurationError:
        raise _refusal(connection) from None
    raise _refusal(connection, "is not awaited: queue.record(..., connection=...)")


def _raw_async() -> tuple[Any, ...]:
    return _loaded("aiosqlite", "Connection") + _loaded("psycopg", "AsyncConnection")


def sqlalchemy_run_sync(connection: Any) -> Callable[..., Any] | None:
    asynchronous = "sqlalchemy.ext.asyncio"
    if isinstance(connection, _loaded(asynchronous, "async_scoped_session")):
        connection = connection()
    if isinstance(connection, _loaded(asynchronous, "AsyncSession", "AsyncConnection")):
        run_sync: Callable[..., Any] = connection.run_sync
        return run_sync
    return None


_UNKNOWN = (
    "is none of: sqlite3's, SQLAlchemy's Session or Connection, Django's, psycopg's (and another SQLite"
    " library must not use the same file in one process: neither would see the other's locks)"
)


def _refusal(connection: Any, what: str = _UNKNOWN) -> ConfigurationError:
    kind = type(connection)
    return ConfigurationError(f"connection, a {kind.__module__}.{kind.__qualname__}, {what}")


def _check_library(dialect: str, driven: Any) -> None:
    """Raise for a connection that another SQLite library than Python's has opened."""
    if dialect == "sqlite" and not isinstance(
        driven, (sqlite3.Connection, *_loaded("aiosqlite", "Connection"))
    ):
        raise _refusal(driven)


class _SQLite:
    dialect = "sqlite"

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = self.driven = connection

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        cursor = self._connection.cursor()
        cursor.row_factory = None  # the caller's may make anything of a row
        return cursor.execute(statement, values).fetchall()

    def when_committed(self, call: Callable[..., object]) -> None:
        """Do nothing: sqlite3 tells nobody."""


class _SQLAlchemy:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.dialect: str = connection.dialect.name
        self.driven = connection.connection.driver_connection
        _check_library(self.dialect, self.driven)

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        # Its own method: it must know that a transaction has begun, else it would not commit it.
        # Python's sqlite3 takes question marks whatever style SQLAlchemy was told to use with it.
        style = "qmark" if self.dialect == "sqlite" else self._connection.dialect.paramstyle
        statement = _in_style(statement, style)
        result = self._connection.exec_driver_sql(statement, values or None)
        return list(result.fetchall()) if result.returns_rows else []

    def when_committed(self, call: Callable[..., object]) -> None:
        """Do nothing: a Connection tells before the commit, not after."""

    def is_two_phase(self) -> bool:
        return isinstance(self._connection.get_transaction(), _loaded("sqlalchemy", "TwoPhaseTransaction"))


class _SQLAlchemySession(_SQLAlchemy):
    def __init__(self, session: Any) -> None:
        super().__init__(session.connection())
        self._session = session

    def when_committed(self, call: Callable[..., object]) -> None:
        from sqlalchemy import event

        ended = self._session, "after_transaction_end", call
        if not event.contains(*ended):
            event.listen(*ended)


class _Django:
    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self.dialect: str = connection.vendor
        connection.ensure_connection()
        self.driven = connection.connection
        _check_library(self.dialect, self.driven)

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        with self._connection.cursor() as cursor:
            cursor.execute(_in_style(statement, "format"), values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def when_committed(self, call: Callable[..., object]) -> None:
        self._connection.on_commit(call, robust=True)


class _Psycopg:
    dialect = "postgresql"

    def __init__(self, connection: Any) -> None:
        self._connection = self.driven = connection

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        plain, tuple_row = *_loaded("psycopg", "Cursor"), *_loaded("psycopg.rows", "tuple_row")
        with plain(self._connection, row_factory=tuple_row) as cursor:  # whatever the caller's are
            return list(cursor.execute(_in_style(statement, "format"), values).fetchall())

    def when_committed(self, call: Callable[..., object]) -> None:
        """Do nothing: the outbox's own NOTIFY comes with the commit."""


class _Aiosqlite:
    dialect = "sqlite"

    def __init__(self, connection: Any) -> None:
        self._connection = self.driven = connection
        self.autocommit: object = None

    async def prepare(self) -> None:
        """Ask sqlite3's own connection, which answers in its own thread only, and which aiosqlite hides."""
        connection = self._connection
        with suppress(AttributeError):
            self.autocommit = await connection._execute(  # noqa: SLF001 - there is no other way
                lambda: getattr(connection._conn, "autocommit", None)  # noqa: SLF001
            )

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        async with self._connection.cursor() as cursor:
            cursor.row_factory = None
            await cursor.execute(statement, values)
            return list(await cursor.fetchall())


class _AsyncPsycopg:
    dialect = "postgresql"

    def __init__(self, connection: Any) -> None:
        self._connection = self.driven = connection

    async def prepare(self) -> None:
        """Do nothing: psycopg's connection can be asked at any time."""

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        plain, tuple_row = *_loaded("psycopg", "AsyncCursor"), *_loaded("psycopg.rows", "tuple_row")
        async with plain(self._connection, row_factory=tuple_row) as cursor:  # whatever the caller's are
            await cursor.execute(_in_style(statement, "format"), values)
            return list(await cursor.fetchall())


@functools.cache
def _in_style(statement: str, style: str) -> str:
    """Write a statement's question marks as a driver wants them (PEP 249); the statements are constants."""
    if style == "qmark":
        return statement
    parts = statement.split("?")
    if style == "numeric_dollar":  # asyncpg
        return "".join(f"{part}${n}" for n, part in enumerate(parts[:-1], 1)) + parts[-1]
    return "%s".join(parts)
