"""Being a guest in an application's own file: its journal mode, its pragmas and its locks are its own."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from perqueue._outbox.connection import retry_busy
from perqueue._outbox.damage import one_row
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    import sqlite3


def be_as_durable(connection: sqlite3.Connection, *, power: bool) -> None:
    """Have commits of this connection synced as ``durability`` asks, in the journal mode that there is.

    With a write-ahead log the thread ``perqueue-disk`` syncs it. Without one SQLite does in each commit:
    less than FULL could damage the application's file, and EXTRA syncs the end of its journal, too.
    """
    (mode,) = retry_busy(lambda: one_row(connection, "PRAGMA journal_mode"))
    level = "NORMAL" if mode == "wal" else "EXTRA" if power else "FULL"
    connection.execute(f"PRAGMA synchronous = {level}")


def check_own_locks(connection: sqlite3.Connection, path: Path) -> None:
    """Raise if SQLite only believes to hold the file's lock, because a parent process held it at a fork.

    SQLite remembers locks for each file and process. A child inherits that memory with any connection that
    was open in the parent, and its new ones find in it what they need, while another process, which sees
    no lock, may delete the write-ahead log that they write to.
    """
    connection.execute("BEGIN")
    try:
        retry_busy(lambda: one_row(connection, "SELECT count(*) FROM perqueue_outbox"))
        if not _has_lock(path) and _can_see_locks(path):
            message = (
                f"outbox {path}: a connection to it was open when this process was forked, so that SQLite's"
                " locks do not work in here: close the application's connections before the fork"
                " (SQLAlchemy: engine.dispose(), Django: connections.close_all())"
            )
            raise OutboxError(message)
    finally:
        connection.execute("ROLLBACK")


def _has_lock(path: Path) -> bool:
    """Tell whether the kernel lists a lock of this process on a file."""
    me, inode = str(os.getpid()), f":{path.stat().st_ino}"
    with suppress(OSError):  # Linux: see proc_locks(5)
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            fields = line.split()
            if fields[1] == "POSIX" and fields[4] == me and fields[5].endswith(inode):
                return True
    return False


def _can_see_locks(path: Path) -> bool:
    """Tell whether a lock that is there would be listed: not on every system, nor for every file system."""
    beside = Path(f"{path}-setup.lock")  # where nobody has such a lock: closing it drops none
    with suppress(OSError), beside.open("rb") as file:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _has_lock(beside)
    return False
