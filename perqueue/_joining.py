"""Recording in a transaction of the caller's, whichever library its connection is of.

None of those libraries is imported here: whoever passes a connection has imported its library. What they
have in common is told by the outbox (:data:`perqueue._outbox.protocol.Steps`), so that any backend needs no
more than its own statements.
"""

from __future__ import annotations

import functools
import sqlite3
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from perqueue._activity import Activity
from perqueue._outbox.connection import TAMPERED, is_tampered
from perqueue.exceptions import ConfigurationError, OutboxError, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from perqueue._outbox import Key, Outbox
    from perqueue._outbox.protocol import Steps

_MISUSES = {"InterfaceError", "NotSupportedError", "ProgrammingError"}
"""What drivers raise for a connection that is closed, or another thread's, or lacks the tables (PEP 249)."""


class Entry(NamedTuple):
    """An activity that is to exist exactly if the caller's transaction is committed."""

    outbox: Outbox
    key: Key
    window: tuple[int, int] | None
    recorded_at: int
    wake: Callable[..., object]
    """Called after the commit, where the library tells of it (elsewhere the drain notices it by itself)."""


class _Joint(Protocol):
    """A connection, seen as what it takes to join its transaction."""

    dialect: str
    driven: Any
    """The connection of the driver itself."""

    def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        """Run a statement in the open transaction, beginning one as the library does, and return all rows."""

    def when_committed(self, call: Callable[..., object]) -> None:
        """Have it called after the commit, if the library can."""


class _AsyncJoint(Protocol):
    dialect: str
    driven: Any

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]: ...


def join(connection: Any, entry: Entry) -> int:
    """Record in the transaction that is open on a connection, and return the ID of the activity.

    Raises :class:`ConfigurationError` if this connection cannot be used, or :class:`OutboxError`; nothing
    else comes out.
    """
    with _errors(entry):
        joint = _joint(connection)
        _check_dialect(joint.dialect, entry)
        steps = _together(joint, entry)
        try:
            request = next(steps)
            while True:
                try:
                    rows = joint.run(*request)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, having tidied up
                    request = steps.throw(error)
                else:
                    request = steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
        with suppress(Exception):  # it is recorded: who cannot be told of the commit notices it
            joint.when_committed(entry.wake)
    return activity_id


async def ajoin(connection: Any, entry: Entry) -> int:
    """Do as :func:`join`, on a connection whose methods are awaited."""
    with _errors(entry):
        if (run_sync := _sqlalchemy_run_sync(connection)) is not None:
            joined: int = await run_sync(functools.partial(join, entry=entry))
            return joined
        joint = _async_joint(connection)
        _check_dialect(joint.dialect, entry)
        steps = _together(joint, entry)
        try:
            request = next(steps)
            while True:
                try:
                    rows = await joint.run(*request)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, having tidied up
                    request = steps.throw(error)
                else:
                    request = steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
    return activity_id


def _together(joint: _Joint | _AsyncJoint, entry: Entry) -> Steps:
    """Have the steps committed together, also where each would be by itself.

    Else the activity could be there without the window that it stands for, or with an error that denies it.
    """
    steps = entry.outbox.joining(entry.key, entry.window, entry.recorded_at)
    rows = yield next(steps)  # which only asks, but begins what the library begins before any statement
    alone = entry.window is not None and _commits_each(joint.driven)
    begun = False
    try:
        if alone:
            yield "BEGIN IMMEDIATE", ()
            begun = True
        try:
            while True:
                rows = yield steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
        if alone:
            yield "COMMIT", ()
    except BaseException as error:
        # A BEGIN that failed may have met another's transaction; one that was cancelled may yet succeed.
        if begun or (alone and not isinstance(error, Exception)):
            with suppress(Exception):
                yield "ROLLBACK", ()
        raise
    return activity_id


def _commits_each(driven: Any) -> bool:
    """Tell whether a statement on a connection of sqlite3's or aiosqlite's would now commit itself."""
    if getattr(driven, "in_transaction", True):  # psycopg's has none: its backend's steps are one statement
        return False
    return driven.isolation_level is None or getattr(driven, "autocommit", None) is True


def _check_dialect(dialect: str, entry: Entry) -> None:
    if dialect != entry.outbox.dialect:
        message = f"connection leads to a {dialect} database, and the outbox is in {entry.outbox.dialect}"
        raise ConfigurationError(message)


# -- what the libraries' errors mean


@contextmanager
def _errors(entry: Entry) -> Iterator[None]:
    try:
        yield
    except PerQueueError as error:
        _name(error, entry)
        raise
    except Exception as error:  # noqa: BLE001 - whatever its library raises
        ours, cause = _ours(error)
        _name(ours, entry)
        raise ours from cause


def _name(error: PerQueueError, entry: Entry) -> None:
    if isinstance(error, OutboxError):
        billing_id, user_id, kind = entry.key
        error.activity = Activity(
            id=0,
            billing_id=billing_id,
            user_id=user_id,
            activity_type_id=kind,
            recorded_at=entry.recorded_at,
        )


def _ours(error: Exception) -> tuple[PerQueueError, BaseException]:
    """Return our error, and the driver's own: SQLAlchemy's text has all values in it."""
    cause = getattr(error, "orig", None) or error
    if type(error.__cause__).__name__ == type(error).__name__:  # Django's wrap the driver's of the same name
        cause = error.__cause__
    why = str(cause).partition("\n")[0] or type(cause).__name__
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    by_django = type(cause).__module__.startswith("django.")  # which has not asked the driver
    if "Error" in kinds and not kinds & _MISUSES and not by_django:
        if is_tampered(cause):
            why = f"{why} ({TAMPERED})"
        message = f"not recorded, and the transaction it was to be part of had better be rolled back: {why}"
        return OutboxError(message), cause
    return ConfigurationError(f"not recorded, because the connection cannot be used: {why}"), cause


def explain_lock(error: OutboxError) -> None:
    """Say what to do if the lock that was waited for may be the caller's own."""
    code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        hint = (
            "if that was a transaction of this very thread, record(..., connection=...) makes this part of it"
        )
        error.args = (f"{error}; {hint}",)


# -- the libraries


def _loaded(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a module, as far as it is loaded."""
    found = sys.modules.get(module)
    return tuple(getattr(found, name) for name in names if hasattr(found, name))


def _joint(connection: Any) -> _Joint:
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
    if _sqlalchemy_run_sync(connection) or isinstance(connection, _raw_async()):
        raise _refusal(connection, "is awaited: await queue.arecord(..., connection=...)")
    raise _refusal(connection)


def _async_joint(connection: Any) -> _AsyncJoint:
    if isinstance(connection, _loaded("aiosqlite", "Connection")):
        return _Aiosqlite(connection)
    if isinstance(connection, _loaded("psycopg", "AsyncConnection")):
        return _AsyncPsycopg(connection)
    try:
        _joint(connection)
    except ConfigurationError:
        raise _refusal(connection) from None
    raise _refusal(connection, "is not awaited: queue.record(..., connection=...)")


def _raw_async() -> tuple[Any, ...]:
    return _loaded("aiosqlite", "Connection") + _loaded("psycopg", "AsyncConnection")


def _sqlalchemy_run_sync(connection: Any) -> Callable[..., Any] | None:
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
        (tuple_row,) = _loaded("psycopg.rows", "tuple_row")  # whatever the caller's rows are
        with self._connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(_in_style(statement, "format"), values)
            return list(cursor.fetchall()) if cursor.description else []

    def when_committed(self, call: Callable[..., object]) -> None:
        """Do nothing: the outbox's own NOTIFY comes with the commit."""


class _Aiosqlite:
    dialect = "sqlite"

    def __init__(self, connection: Any) -> None:
        self._connection = self.driven = connection

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        async with self._connection.cursor() as cursor:
            cursor.row_factory = None
            await cursor.execute(statement, values)
            return list(await cursor.fetchall())


class _AsyncPsycopg:
    dialect = "postgresql"

    def __init__(self, connection: Any) -> None:
        self._connection = self.driven = connection

    async def run(self, statement: str, values: tuple[object, ...]) -> list[Any]:
        (tuple_row,) = _loaded("psycopg.rows", "tuple_row")  # whatever the caller's rows are
        async with self._connection.cursor(row_factory=tuple_row) as cursor:
            await cursor.execute(_in_style(statement, "format"), values)
            return list(await cursor.fetchall()) if cursor.description else []


@functools.cache
def _in_style(statement: str, style: str) -> str:
    """Write a statement's question marks as a driver wants them (PEP 249); the statements are constants."""
    if style == "qmark":
        return statement
    parts = statement.split("?")
    if style == "numeric_dollar":  # asyncpg
        return "".join(f"{part}${n}" for n, part in enumerate(parts[:-1], 1)) + parts[-1]
    return "%s".join(parts)
