"""The database as one process uses it: a few connections for its threads, and one for its drain."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, LiteralString

import psycopg

from perqueue import _fork, _threads
from perqueue._outbox.postgres.connection import (
    MADE_ANEW,
    PATIENCE,
    Connections,
    checked,
    database_errors,
    outbox_error,
)
from perqueue._outbox.postgres.schema import set_up
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.abc import Params

    from perqueue._address import DatabaseURL
    from perqueue._outbox.postgres.connection import Connection

_OPENING_PATIENCE = 5.0
"""Seconds to wait for the first connection: a program that starts can wait longer than one that records."""
_TRIES = 3
"""Connections to try, one after the other, if the server ends each in the moment in which it is used."""
thread_id = _threads.original("_thread", "get_ident")
"""Who one is, whatever gevent has patched."""


class Session:
    """An outbox in a database, which need not answer all the time."""

    _patience = PATIENCE
    """Seconds that a statement may take. Who only looks, on somebody's command, can wait longer."""

    def __init__(self, url: DatabaseURL, origin: str | None, *, create: bool) -> None:
        self._url = checked(url)
        self._shared = Connections(url)
        self._drains = Connections(url, most=1)
        self._begin_afresh()
        self._closed = False
        try:
            with database_errors(url):
                connection = self._shared.take(_OPENING_PATIENCE)
            try:
                found = set_up(connection, url, origin, create=create)
            finally:
                self._shared.give_back(connection)
        except BaseException:
            self.close()
            raise
        self._outbox_id, self._origin, self._schema = found.outbox_id, found.origin, found.schema
        self._channel = f"perqueue_{self._outbox_id[:8]}"
        _fork.participate(self)

    @property
    def outbox_id(self) -> str:
        """The same for all processes that have this outbox open, and for no other."""
        return self._outbox_id

    def origin(self) -> str | None:
        """Return whose Per the outbox belonged to when it was opened; None if that was not known."""
        return self._origin

    def _begin_afresh(self) -> None:
        self._pid = os.getpid()
        self._drain_thread: int | None = None
        self._drain_connection: Connection | None = None

    def _rows(
        self,
        query: LiteralString,
        values: Params = (),
        *,
        prepare: bool = False,
        patience: float | None = None,
    ) -> list[Any]:
        """Run one statement, committed at once, and return its rows."""
        # Written out for record(): each context manager would cost it a percent.
        tries = _TRIES
        try:
            while True:
                own, connection = self._take()
                try:
                    return connection.run(query, values, prepare=prepare, patience=patience or self._patience)
                except psycopg.errors.IdleSessionTimeout:  # so the server never saw the statement
                    tries -= 1
                    if not tries:
                        raise
                finally:
                    if not own:
                        self._shared.give_back(connection)
        except psycopg.Error as error:
            raise outbox_error(self._url, error) from None  # whose text may hold the password

    def _row(
        self, query: LiteralString, values: Params = (), *, patience: float | None = None
    ) -> tuple[Any, ...]:
        rows = self._rows(query, values, patience=patience)
        if not rows:
            missing = "a row is missing that must be there: was a table emptied?"
            message = f"outbox {self._url}: {missing} {MADE_ANEW}"
            raise OutboxError(message)
        row: tuple[Any, ...] = rows[0]
        return row

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Run several statements as one: committed at the end, rolled back on any exception."""
        with database_errors(self._url), self._lent() as connection, connection.transaction():
            yield connection

    @contextmanager
    def _lent(self) -> Iterator[Connection]:
        own, connection = self._take()
        connection.patience = self._patience
        try:
            yield connection
        finally:
            if not own:
                self._shared.give_back(connection)

    def _take(self) -> tuple[bool, Connection]:
        """Return a connection to use, and whether it is the drain's own."""
        if self._closed:
            message = f"outbox {self._url} is closed"
            raise OutboxError(message)
        if self._is_drain_thread():
            return True, self._drain_own()
        return False, self._shared.take()

    def _is_drain_thread(self) -> bool:
        return self._drain_thread == thread_id() and self._pid == os.getpid()

    def _drain_own(self) -> Connection:
        """Return the drain's connection: no number of recorders can keep it waiting."""
        connection = self._drain_connection
        if connection is None or connection.closed:
            if connection is not None:
                self._drains.give_up(connection)
                self._drain_connection = None
            connection = self._drains.take()
            try:
                self._prepare_to_drain(connection)
            except BaseException:
                self._drains.give_up(connection)
                raise
            self._drain_connection = connection
        return connection

    def _prepare_to_drain(self, connection: Connection) -> None:
        """Do what the drain's connection needs, once it is there."""

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._closed = True
        if self._pid != os.getpid():
            return
        connection, self._drain_connection = self._drain_connection, None
        self._drains.close()
        if connection is not None:
            self._drains.give_back(connection)
        self._shared.close()
        _fork.withdraw(self)

    def before_fork(self) -> None:
        """Nothing to do: connections stay the parent's."""

    def after_fork_in_parent(self) -> None:
        """Nothing to do."""

    def after_fork_in_child(self) -> None:
        """Leave the parent's connections alone: closing one would end it for the parent, too."""
        with suppress(Exception):
            self._inherited = (self._drain_connection, getattr(self, "_inherited", None))
        self._shared.abandon()
        self._drains.abandon()
        self._begin_afresh()
