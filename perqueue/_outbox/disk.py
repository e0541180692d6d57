"""The thread ``perqueue-disk``: syncs and checkpoints, so that no ``record()`` has to wait for one."""

from __future__ import annotations

import logging
import os
import queue
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue._outbox.connection import connect, outbox_error, sync_directory

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("perqueue")

GATHER = 0.025
"""Seconds in which commits gather before one sync serves them all; the promise is 50 ms."""
CHECKPOINT_COMMITS = 500
WAL_LIMIT = 4 * 1024 * 1024
"""Bytes of WAL beyond which it is truncated under the record lock. PASSIVE checkpoints never shrink it."""


class DiskKeeper:
    """Keeps what was committed safe on disk, and the WAL small."""

    def __init__(self, path: Path, truncate: Callable[[], object], is_same_file: Callable[[], bool]) -> None:
        self._path = path
        self._wal_path = f"{path}-wal"
        self._truncate = truncate
        self._is_same_file = is_same_file
        self._wal: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._committed = 0
        self._synced = 0
        self._checkpointed = 0
        self._idle = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        # Not an Event: a signal handler that records while its thread is in Event.set() would hang.
        # SimpleQueue.put() is re-entrant by its documentation.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._sync_lock = threading.RLock()  # a signal handler may record while its thread is in sync()
        # Held while the checkpointing connection is open: nobody may fork meanwhile.
        self._checkpoint_lock = threading.Lock()

    def start(self) -> None:
        """Start the thread if it does not run; without effect while the interpreter shuts down."""
        if self._thread is None:
            try:
                thread = threading.Thread(target=self._run, name="perqueue-disk", daemon=True)
                self._thread = thread  # before it starts: a signal handler may come here, too
                thread.start()
            except BaseException as error:
                self._thread = None
                if not isinstance(error, RuntimeError):  # no new threads at shutdown: close() syncs
                    raise

    def committed(self, commits: int = 1) -> None:
        """Take note of a commit. Called under the record lock."""
        self._committed += commits
        if self._idle:
            self._wake.put(None)

    def sync(self) -> None:
        """Return once everything committed before this call is on disk; concurrent callers share one sync.

        Raises :class:`OSError` if the disk refuses.
        """
        wanted = self._committed
        with self._sync_lock:
            if self._synced >= wanted:
                return
            target = self._committed
            descriptor = self._wal_descriptor()
            if descriptor is not None:
                os.fdatasync(descriptor)
            self._synced = max(self._synced, target)

    def _wal_descriptor(self) -> int | None:
        """Return a descriptor of the WAL as it is now; None when everything is in the main file."""
        # A descriptor of our own is safe for the -wal (SQLite locks the main file and the -shm), but the
        # WAL may have been unlinked and made anew, and syncing an unlinked file "succeeds".
        try:
            now = os.stat(self._wal_path)  # noqa: PTH116
        except FileNotFoundError:
            return None
        if self._wal is not None:
            held = os.fstat(self._wal)
            if (held.st_dev, held.st_ino) == (now.st_dev, now.st_ino):
                return self._wal
            os.close(self._wal)
            self._wal = None
        try:
            self._wal = os.open(self._wal_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        sync_directory(self._path)
        return self._wal

    def _run(self) -> None:
        complained = False
        while not self._stopping:
            self._idle = True
            if self._synced == self._committed:
                self._wake.get()
            self._idle = False
            if self._stop.wait(GATHER):
                return
            try:
                self.sync()
                self._checkpoint()
                complained = False
            except Exception as error:  # noqa: BLE001 - the thread must live through a full or failing disk
                if not complained:
                    log.error("%s", outbox_error(self._path, error))
                complained = True
                self._stop.wait(1.0)

    def _checkpoint(self) -> None:
        if self._committed - self._checkpointed < CHECKPOINT_COMMITS:
            return
        # Only ever with commits since the last one: SQLite up to 3.51.2 can corrupt a file when a
        # checkpoint that finds nothing to do meets a writer that restarts the WAL (SQLite's
        # documentation, "The WAL-Reset Bug").
        self._checkpointed = self._committed
        with self._checkpoint_lock:
            # Another file in its place has the same -shm by name: opening that would cut the one that is
            # mapped here, and the next record() would die of SIGBUS.
            if not self._is_same_file():
                return
            connection = connect(self._path)
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                connection.close()
        with suppress(FileNotFoundError):  # closed for a fork, and not yet used again
            if os.stat(self._wal_path).st_size > WAL_LIMIT:  # noqa: PTH116
                self._truncate()

    def close(self) -> None:
        """Stop the thread and sync what it had not."""
        self._stopping = True
        self._stop.set()
        self._wake.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5)
        with suppress(OSError):
            self.sync()
        with self._sync_lock:
            if self._wal is not None:
                os.close(self._wal)
                self._wal = None

    def before_fork(self) -> None:
        """Wait for a running checkpoint or sync, and begin none before the fork is over."""
        self._checkpoint_lock.acquire()
        self._sync_lock.acquire()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        self._sync_lock.release()
        self._checkpoint_lock.release()

    def after_fork_in_child(self) -> None:
        """Forget the parent's thread; the child starts its own with its first commit."""
        if self._wal is not None:
            os.close(self._wal)
            self._wal = None
        self._reset()


def truncate(connection: sqlite3.Connection) -> None:
    """Empty the WAL, unless a reader in another process still needs it."""
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
