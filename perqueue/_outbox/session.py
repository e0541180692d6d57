"""One SQLite connection for a process, under one lock, that forks and renamed files cannot fool.

One connection, because SQLite drops a connection's whole page cache when another one writes; one lock,
because two threads of a process that meet in SQLite's own locks sleep, and those that meet here do not.
The lock is re-entrant: a signal handler may record while its thread is inside ``record()``.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from perqueue import _fork, _threads
from perqueue._outbox.connection import (
    BUSY_TIMEOUT,
    connect,
    identity,
    outbox_error,
    retry_busy,
    set_up,
    storage_errors,
)
from perqueue._outbox.damage import one_row
from perqueue._outbox.disk import DiskKeeper, truncate
from perqueue._outbox.embedded import be_as_durable, check_own_locks
from perqueue._place import real_path
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator
    from pathlib import Path

IDENTITY_INTERVAL_MS = 100
"""How often, at most, ``record()`` looks whether the file is still the one that was opened."""


_never_closed: list[sqlite3.Connection] = []  # inherited through a fork: neither used nor closed here


def is_owned(lock: threading.RLock) -> bool:
    """Tell whether this thread holds the lock: in a signal handler that interrupted its holder, say."""
    return bool(lock._is_owned())  # type: ignore[attr-defined]  # noqa: SLF001 - threading.Condition's too


def release_after_all(lock: threading.RLock) -> None:
    """Release a lock on the way out of an exception, even one that a signal handler raised in acquire().

    Between the lock's acquisition and the next line of Python an exception can come, so that whoever
    acquires must do so within its ``try``, and does not know there whether it did.
    """
    with suppress(RuntimeError):  # it did not
        lock.release()


class Session:
    """An outbox file, opened when needed."""

    _power = False

    def __init__(self, path: Path, origin: str | None, *, create: bool, embedded: bool | None = None) -> None:
        self._path = path = real_path(path)
        self._file = str(path)
        self._disk = DiskKeeper(path, self._mark, self._truncate, self._is_same_file)
        self._lock = _threads.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity = (0, 0)
        self._outbox_id: str | None = None
        self._pid = os.getpid()
        self._closed = self._forking = False
        self._checked_at = 0
        self._openings = 0
        with _fork.quiet:
            self._embedded = set_up(path, origin, create=create, embedded=embedded)
            self._disk.checkpoints = not self._embedded
            with self._held():
                self._usable()
            _fork.participate(self)

    @property
    def path(self) -> Path:
        """Where the file is, without symbolic links: what the names of the files beside it begin with."""
        return self._path

    @property
    def outbox_id(self) -> str:
        """What this outbox is told from all others by, wherever it lies."""
        return self._outbox_id or ""

    @contextmanager
    def _held(self) -> Iterator[None]:
        if self._pid != os.getpid():
            self._foreign()  # before the lock: a thread that is not in this process may hold it
        lock = self._lock
        nested = is_owned(lock)
        try:
            if not nested and not lock.acquire(timeout=BUSY_TIMEOUT * 2):
                self._locked()
            yield
        except BaseException:
            if not nested:
                release_after_all(lock)
            raise
        if not nested:
            lock.release()

    def _locked(self) -> NoReturn:
        message = f"outbox {self._path}: another thread held its lock for over {BUSY_TIMEOUT:g} s"
        raise OutboxError(message)

    def _foreign(self) -> NoReturn:
        message = (
            "this process was forked without Python's fork hooks (uWSGI forks in C), so the outbox cannot"
            " be used in it: create the PerQueue after the fork (uWSGI: lazy-apps = true, or @postfork)"
        )
        raise OutboxError(message)

    def _usable(self) -> sqlite3.Connection:
        """Return the connection, opened if need be. Called under the lock."""
        if self._closed:
            message = f"outbox {self._path} is closed"
            raise OutboxError(message)
        if self._connection is None:
            with storage_errors(self._path):
                self._identity = identity(self._path)
                connection = connect(self._path, embedded=self._embedded)
                try:
                    (outbox_id,) = retry_busy(
                        lambda: one_row(connection, "SELECT outbox_id FROM perqueue_outbox")
                    )
                    if self._embedded:
                        check_own_locks(connection, self._path)
                        be_as_durable(connection, power=self._power)
                except BaseException:
                    connection.close()
                    raise
            if self._outbox_id not in (None, outbox_id):
                connection.close()
                self._replaced()
            self._outbox_id = outbox_id
            self._connection = connection
            self._openings += 1
            self._disk.start()
        return self._connection

    def _replaced(self) -> NoReturn:
        message = f"outbox {self._path} was replaced by another one: restart the program to use that"
        raise OutboxError(message)

    def _is_same_file(self) -> bool:
        with suppress(OSError):
            return identity(self._path) == self._identity
        return False

    def _check_identity(self, now: int) -> None:
        """Notice a file that was renamed or deleted: SQLite would go on writing to it."""
        try:
            same = identity(self._path) == self._identity
        except OSError as error:
            raise outbox_error(self._path, error) from error
        if not same:
            self._give_up_connection()
            message = f"outbox {self._path} was renamed or replaced while in use"
            raise OutboxError(message)
        if self._embedded and self._connection is not None:
            with storage_errors(self._path):
                be_as_durable(self._connection, power=self._power)
        self._checked_at = now

    def _give_up_connection(self) -> None:
        """Start afresh with the next use: an I/O error may leave a connection in doubt."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._held(), storage_errors(self._path):
            yield self._usable()

    @contextmanager
    def _begun(self) -> Iterator[sqlite3.Connection]:
        """Hold the lock, and a write transaction for whoever commits it."""
        nested = is_owned(self._lock)
        with self._held(), storage_errors(self._path):
            # Somebody else's transaction may take its time: what only reads does not wait for it, too.
            yield retry_busy(self._begin, _threads.native_sleep if nested else self._sleep_aside)

    def _begin(self) -> sqlite3.Connection:
        connection = self._usable()
        if connection.in_transaction:
            self._in_transaction()
        connection.execute("BEGIN IMMEDIATE")
        return connection

    def _sleep_aside(self, seconds: float) -> None:
        """Sleep without the lock. Called by who holds it."""
        self._lock.release()
        _threads.native_sleep(seconds)
        if not self._lock.acquire(timeout=BUSY_TIMEOUT * 2):
            self._locked()

    @contextmanager
    def _writing(self, commits: int = 1) -> Iterator[sqlite3.Connection]:
        """Hold one write transaction, committed at the end and rolled back on any exception."""
        with self._begun() as connection, self._committing(connection, commits):
            yield connection

    @contextmanager
    def _committing(self, connection: sqlite3.Connection, commits: int = 1) -> Iterator[None]:
        try:
            before = connection.total_changes
            yield
            retry_busy(lambda: connection.execute("COMMIT"))  # without a WAL, readers are in its way
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise
        if connection.total_changes != before:  # else it wrote nothing: a checkpoint has nothing to do
            self._disk.committed(commits)

    def _in_transaction(self) -> NoReturn:
        # What is written here would be committed, or rolled back, with what was interrupted.
        message = (
            "called by a finalizer or a signal handler in the middle of one of perqueue's own transactions,"
            " where nothing can be committed: record it again, from elsewhere"
        )
        raise OutboxError(message)

    def _mark(self) -> None:
        """Commit something, so that the next checkpoint has something to do."""
        with self._writing() as connection:
            if self._embedded:  # its user_version is the application's
                connection.execute("UPDATE perqueue_drain SET holds = holds")
                return
            (marks,) = connection.execute("PRAGMA user_version").fetchone()
            connection.execute(f"PRAGMA user_version = {(marks + 1) % 2**31}")

    def _truncate(self) -> bool:
        """Empty the WAL, and tell whether that was possible."""
        with self._held(), storage_errors(self._path):
            self._mark()
            return self._disk.is_alone() and truncate(self._usable())

    def close(self) -> None:
        """Sync and close; idempotent."""
        if self._pid != os.getpid():
            self._closed = True  # locks, threads and connection are another process's
            return
        self._disk.close()
        with _fork.quiet, self._lock:
            self._closed = True
            self._give_up_connection()
            _fork.withdraw(self)

    def before_fork(self) -> None:
        """Close the connection: SQLite's locks and connections cannot cross a fork."""
        if self._pid != os.getpid():
            return
        self._lock.acquire()
        self._disk.before_fork()
        self._give_up_connection()
        self._forking = True

    def after_fork_in_parent(self) -> None:
        """Let the next use open it again."""
        if self._forking:
            self._forking = False
            self._disk.after_fork_in_parent()
            self._lock.release()

    def after_fork_in_child(self) -> None:
        """Start with a lock that no lost thread can hold."""
        if not self._forking:
            return  # of a process that may not use it either
        self._forking = False
        self._lock = _threads.RLock()
        self._disk.after_fork_in_child()
        if self._connection is not None:  # somebody's own hook, or a signal handler, has used it since
            _never_closed.append(self._connection)
            self._connection = None
        self._pid = os.getpid()
