"""Opening an outbox file, and the one seam at which SQLite's errors become ours."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from perqueue import _threads
from perqueue._outbox.damage import ROW_IS_MISSING, corrupt, one_row
from perqueue._place import examine, make_for_owner
from perqueue.exceptions import OutboxError, OutboxMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

T = TypeVar("T")

SCHEMA_VERSION = 2
BUSY_TIMEOUT = 1.0
"""Seconds after which a lock that somebody else holds becomes an :class:`OutboxError`."""
_SET_UP_TIMEOUT = 5.0
"""Seconds for which making the tables waits for whoever else uses the file."""
PAGE_SIZE = 1024
"""Bytes of a page in a new file: one insert writes one page to the WAL.

2 KiB would save 6 % of the disk, and fill the WAL twice as fast; 4 KiB make ``record()`` slower by a sixth.
"""
_OLDEST_SQLITE = (3, 37, 0)  # STRICT tables
APPLICATION_ID = 0x50657251
"""``PerQ``: a file of perqueue's own. Another one with its tables is an application's, and left as it is."""

_DISK_FULL = "the disk is full: free space, delivery and recording go on by themselves"
_DAMAGED = "the file is damaged: `perqueue doctor` says what can be rescued"
TAMPERED = (
    "another program has dropped, renamed, altered or emptied perqueue's tables, a migration or a test's"
    " teardown, say: have it spare what begins with perqueue_, and restart this one, which makes anew what is"
    f" gone altogether; if nobody has, {_DAMAGED}"
)
_REMEDIES = {
    sqlite3.SQLITE_FULL: _DISK_FULL,
    sqlite3.SQLITE_IOERR_SHMSIZE: _DISK_FULL,  # there is no room for the -shm
    sqlite3.SQLITE_IOERR: "the disk or file system reports an error: look at the kernel's log",
    sqlite3.SQLITE_READONLY: "the file or its directory cannot be written: look at owner, mode and mount",
    sqlite3.SQLITE_CANTOPEN: "the file cannot be opened: look at its directory's owner, mode and mount",
    sqlite3.SQLITE_PERM: "the file's permissions forbid it",
    # Of our statements none is wrong: a table is missing, or something else of the schema.
    sqlite3.SQLITE_ERROR: _DAMAGED,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
    sqlite3.SQLITE_BUSY: f"another process held its lock for over {BUSY_TIMEOUT:g} s",
    sqlite3.SQLITE_LOCKED: f"another connection held its lock for over {BUSY_TIMEOUT:g} s",
}


def outbox_error(path: Path, error: Exception) -> OutboxError:
    """Turn an error of SQLite or of the operating system into ours, with the remedy in its text."""
    if isinstance(error, UnicodeDecodeError):  # of SQLite's message, which quotes the file
        return OutboxError(f"outbox {path}: its schema is no text ({_DAMAGED})")
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0)
        remedy = TAMPERED if is_tampered(error) else _REMEDIES.get(code) or _REMEDIES.get(code & 0xFF, "")
    else:
        code = (error.errno if isinstance(error, OSError) else None) or 0
        remedy = {
            errno.ENOSPC: _DISK_FULL,
            errno.EDQUOT: _DISK_FULL,
            errno.EROFS: _REMEDIES[sqlite3.SQLITE_READONLY],
            errno.EACCES: _REMEDIES[sqlite3.SQLITE_READONLY],
            errno.EPERM: _REMEDIES[sqlite3.SQLITE_READONLY],
            errno.EIO: _REMEDIES[sqlite3.SQLITE_IOERR],
            errno.ENOENT: "the file was removed, or its directory does not exist or takes no files",
        }.get(code, "")
    return OutboxError(f"outbox {path}: {error}" + (f" ({remedy})" if remedy else ""))


def is_tampered(error: BaseException) -> bool:
    """Tell whether an error says that tables or rows are gone which only another program could take away."""
    text = str(error)
    gone = "no such" in text or "has no column" in text or "already exists" in text
    return text == ROW_IS_MISSING or (gone and "perqueue_" in text)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Let no error of SQLite or of the operating system out as it is."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise outbox_error(path, error) from error


def is_busy(error: sqlite3.Error) -> bool:
    """Tell whether waiting may help: somebody else holds a lock."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def retry_busy(operation: Callable[[], T], sleep: Callable[[float], None] = _threads.native_sleep) -> T:
    """Run one statement, again and again for up to a second while another process holds the lock.

    SQLite's own busy handler sleeps whole milliseconds and so starves writers; these pauses begin at
    20 microseconds.
    """
    pause, deadline = 2e-5, 0.0
    while True:
        try:
            return operation()
        except sqlite3.OperationalError as error:
            if not is_busy(error):
                raise
            now = time.monotonic()
            deadline = deadline or now + BUSY_TIMEOUT
            if now >= deadline:
                raise
        sleep(pause)
        pause = min(pause * 1.5, 1e-3)


def as_stored(raw: bytes) -> str:
    """Return a stored text, damaged or not."""
    return raw.decode("utf-8", "surrogateescape")


def connect(path: Path, *, embedded: bool = False) -> sqlite3.Connection:
    """Open an existing file; never create one. An application's is checkpointed as SQLite does by itself."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=rw",
        uri=True,
        isolation_level=None,
        timeout=0,
        check_same_thread=False,
    )
    # A row damaged into invalid UTF-8 must reach the check of its checksum.
    connection.text_factory = as_stored
    try:
        if not embedded:  # checkpoints belong to the disk thread; a commit must not wait for one
            connection.execute("PRAGMA wal_autocheckpoint = 0")
        # This reads the file, which another process may just be creating or closing.
        level = "FULL" if embedded else "NORMAL"
        retry_busy(lambda: connection.execute(f"PRAGMA synchronous = {level}"))
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open an existing file for reading only: the end of such a connection checkpoints nothing."""
    connection = sqlite3.connect(
        f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=0, check_same_thread=False
    )
    connection.text_factory = as_stored
    return connection


def identity(path: Path) -> tuple[int, int]:
    """Return what tells this file from any other that may take its place."""
    # stat, never open: closing a descriptor of the file drops every POSIX lock that SQLite holds on it
    # in this process (SQLite's documentation, "How To Corrupt", section 2.2).
    status = os.stat(path)  # noqa: PTH116 - half the cost of Path.stat, on the hot path
    return status.st_dev, status.st_ino


def set_up(path: Path, origin: str | None, *, create: bool, embedded: bool | None = None) -> bool:
    """Make sure that the file is an outbox of this schema and origin, creating or migrating it.

    ``embedded`` says whose it must be: an application's (True), perqueue's own (False), or either's that is
    there already. Returns whether it is an application's. Raises :class:`OutboxMismatch` for a file or place
    that cannot be this outbox's, :class:`OutboxError` for storage.
    """
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        message = f"SQLite {sqlite3.sqlite_version} is too old: perqueue needs 3.37 or newer"
        raise OutboxMismatch(message)
    with storage_errors(path):
        examine(path, quiet=not create)
        ready, theirs = _is_ready(path, origin, embedded=embedded)
        if ready:
            return theirs
        if ready is None and not create:
            message = f"there is no outbox at {path}"
            raise OutboxMismatch(message)
        if not path.parent.is_dir():  # filelock would create it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if theirs and not path.exists():  # how it is made is theirs to say, and a mistyped path is none
            message = f"there is no database at {path}: the application creates it, perqueue adds its tables"
            raise OutboxMismatch(message)
        if ready is None and not theirs:  # before the lock, which would wait where no file can be made
            with suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        from filelock import FileLock, Timeout

        lock = f"{path}-setup.lock"
        make_for_owner(lock, path)
        try:
            with FileLock(lock, timeout=30, mode=0o600, thread_local=False):
                if not _is_ready(path, origin, embedded=embedded)[0]:
                    _create(path, origin, embedded=theirs)
        except Timeout:
            message = f"outbox {path}: another process has been setting it up for 30 s"
            raise OutboxError(message) from None
    return theirs


def _is_ready(path: Path, origin: str | None, *, embedded: bool | None) -> tuple[bool | None, bool]:
    """Check the file; False means that it is of an older schema or of no origin yet, None that it is new.

    Tells also whether it is an application's.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None, bool(embedded)
    if not stat.S_ISREG(status.st_mode):  # /dev/null, say: it must keep its mode
        message = f"{path} is not a regular file"
        raise OutboxMismatch(message)
    if status.st_size == 0:
        _check_beside(path)
        return None, bool(embedded)
    try:
        header = _read_header(path)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
            raise
        message = (
            f"{path} is not an outbox: it is not even a SQLite file;"
            " if it was one, `perqueue doctor` says what can be rescued"
        )
        raise OutboxMismatch(message) from error
    _check_whose(path, header, embedded=embedded)
    if header.outbox is None:
        return None, bool(embedded)
    version, owner = header.outbox
    if version > SCHEMA_VERSION:
        known = f"schema {version}, known: {SCHEMA_VERSION}"
        message = f"outbox {path} was written by a newer perqueue ({known}): upgrade this one"
        raise OutboxMismatch(message)
    if origin is not None and owner is not None and owner != origin:
        message = (
            f"outbox {path} belongs to {owner}, not to {origin}:"
            " use the base_url (PER_BASE_URL) it was made for, or another file"
        )
        raise OutboxMismatch(message)
    return version == SCHEMA_VERSION and (owner is not None or origin is None), not header.is_own


def _check_whose(path: Path, header: _Header, *, embedded: bool | None) -> None:
    if embedded and header.is_own:
        message = f"{path} is a file of perqueue's own, not an application's: leave out embedded=True"
        raise OutboxMismatch(message)
    if header.outbox is None and header.foreign_tables and not embedded:
        message = (
            f"{path} is not an outbox: it holds something else; give perqueue a file of its own, or say"
            " embedded=True to have its tables in there"
        )
        raise OutboxMismatch(message)
    if header.outbox is not None and not header.is_own and embedded is False:
        message = f"{path} is an application's database with perqueue's tables in it: say embedded=True"
        raise OutboxMismatch(message)


def _check_beside(path: Path) -> None:
    """Raise for an empty file that was not always empty: SQLite would delete its -wal unread."""
    with suppress(FileNotFoundError):
        if path.with_name(f"{path.name}-wal").stat().st_size:
            raise corrupt("the file is empty, but there is a write-ahead log beside it")


def is_embedded(path: Path) -> bool:
    """Tell whether there is an outbox in an application's file; False also if that cannot be read."""
    with suppress(sqlite3.Error, OSError, UnicodeDecodeError):
        if path.stat().st_size:
            header = _read_header(path)
            return header.outbox is not None and not header.is_own
    return False


class _Header(NamedTuple):
    """What kind of database a file is."""

    is_own: bool
    foreign_tables: int
    outbox: tuple[int, str | None] | None
    """Schema version and origin, if there is an outbox in it."""


def _read_header(path: Path) -> _Header:
    connection = connect(path)
    try:
        (application_id,) = retry_busy(lambda: one_row(connection, "PRAGMA application_id"))
        is_own = application_id == APPLICATION_ID
        query = "SELECT tbl_name FROM sqlite_master"  # of an index: the table's name
        names = [name for (name,) in retry_busy(lambda: connection.execute(query).fetchall())]
        if "perqueue_outbox" not in names:
            # With nothing but our own migrations table, it is being created, or that was cut short.
            return _Header(is_own, sum(not name.startswith("perqueue_") for name in names), None)
        query = "SELECT schema_version, origin FROM perqueue_outbox"
        row = retry_busy(lambda: connection.execute(query).fetchone())
        if row is None and not is_own and "perqueue_activity" in names:
            query = "SELECT 1 FROM perqueue_activity LIMIT 1"
            if retry_busy(lambda: connection.execute(query).fetchone()) is None:
                return _Header(is_own, 0, None)  # the application has emptied its database
        if row is None:
            raise corrupt(ROW_IS_MISSING)
        version, origin = row
        if not isinstance(version, int) or not isinstance(origin, str | None):
            raise corrupt("perqueue_outbox holds what was never stored there")
        return _Header(is_own, 0, (version, origin))
    finally:
        connection.close()


def _create(path: Path, origin: str | None, *, embedded: bool) -> None:
    from perqueue._outbox.schema import drop_remains, migrate

    if path.stat().st_size == 0 and not embedded:
        path.chmod(0o600)  # whatever the umask; SQLite gives -wal and -shm the mode of the file
    connection = connect(path, embedded=embedded)
    try:
        # Others may be looking at the file.
        connection.execute(f"PRAGMA busy_timeout = {int(_SET_UP_TIMEOUT * 1000)}")
        if embedded:
            _begin(connection, path)
            drop_remains(connection)
        else:
            _make_own(connection, path)
        migrate(connection, origin)
        if embedded:
            connection.execute("COMMIT")
    finally:
        connection.close()
    sync_directory(path)


def _begin(connection: sqlite3.Connection, path: Path) -> None:
    try:
        connection.execute("BEGIN IMMEDIATE")
    except sqlite3.OperationalError as error:
        if not is_busy(error):
            raise
        message = (
            f"outbox {path}: its tables cannot be made, because a transaction of the application's was open"
            f" for over {_SET_UP_TIMEOUT:g} s: make the first PerQueue outside of transactions"
        )
        raise OutboxError(message) from error


def _make_own(connection: sqlite3.Connection, path: Path) -> None:
    connection.execute(f"PRAGMA page_size = {PAGE_SIZE}")
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    mode = retry_busy(lambda: connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
    if mode != "wal":
        message = f"outbox {path}: the file system does not support SQLite's WAL mode ({mode})"
        raise OutboxError(message)


def sync_directory(path: Path) -> None:
    """Make a new file's name survive a power cut."""
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
