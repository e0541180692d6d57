"""The thread ``perqueue-disk``: syncs and checkpoints, so that no ``record()`` has to wait for one."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import sqlite3
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from perqueue import _threads
from perqueue._complaints import Complaints
from perqueue._outbox.connection import connect, outbox_error, sync_directory
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

log = logging.getLogger("perqueue")

GATHER = 0.025
"""Seconds in which commits gather before one sync serves them all; the promise is 50 ms."""
CHECKPOINT_COMMITS = 3000
"""So many to a checkpoint, which disturbs whoever records; the WAL that they make is below its limit."""
WAL_LIMIT = 4 * 1024 * 1024
"""Bytes of WAL beyond which it is truncated under the record lock. PASSIVE checkpoints never shrink it."""
_RETRY = 1.0
"""Seconds until the next try of what failed."""


class DiskKeeper:
    """Keeps what was committed safe on disk, and the WAL small."""

    def __init__(
        self,
        path: Path,
        mark: Callable[[], object],
        truncate: Callable[[], bool],
        is_same_file: Callable[[], bool],
    ) -> None:
        self._path = path
        self._wal_path = f"{path}-wal"
        self._mark = mark
        self._truncate = truncate
        self._is_same_file = is_same_file
        self.checkpoints = True
        """Whether checkpoints are this thread's business: not in an application's own file."""
        self._wal: int | None = None
        self._guard: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._committed = 0
        self._synced = 0
        self._checkpointed = 0
        self._checkpoint_at = 0.0
        self._in_doubt = False
        self._complaints = Complaints(time.monotonic)
        self._idle = False
        self._stopping = False
        self._thread: _threads.Thread | None = None
        # Not an Event: a signal handler that records while its thread is in Event.set() would hang.
        # SimpleQueue.put() is re-entrant by its documentation.
        self._wake: _threads.SimpleQueue[None] = _threads.SimpleQueue()
        self._stop: _threads.SimpleQueue[None] = _threads.SimpleQueue()
        self._sync_lock = _threads.RLock()  # a signal handler may record while its thread is in sync()
        # Held while the checkpointing connection is open: nobody may fork meanwhile.
        self._checkpoint_lock = _threads.Lock()

    def start(self) -> None:
        """Start the thread if it does not run; without effect while the interpreter shuts down."""
        if self._thread is None:
            try:
                thread = _threads.new_thread(self._run, name="perqueue-disk")
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

        Raises :class:`OSError` if the disk refuses, and from then on until the WAL has been renewed.
        """
        wanted = self._committed
        with self._sync_lock:
            if self._in_doubt:
                raise OSError(
                    errno.EIO, "the disk failed to sync, and what it may have lost is not rewritten yet"
                )
            if self._synced >= wanted:
                return
            target = self._committed
            descriptor = self._wal_descriptor()
            if descriptor is not None:
                try:
                    os.fdatasync(descriptor)
                except OSError:
                    self._in_doubt = True
                    raise
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
        began = 0.0
        while not self._stopping:
            self._idle = True
            if self._synced == self._committed and not self._in_doubt:
                self._wake.get()
                began = time.monotonic()
            self._idle = False
            # What came while a slow disk was busy has waited long enough.
            if self._stopped_within(max(0.0, began + GATHER - time.monotonic())):
                return
            began = time.monotonic()
            try:
                self._renew()
                self.sync()
            except Exception as error:  # noqa: BLE001 - the thread must live through a full or failing disk
                self._complain(error)
                self._stopped_within(_RETRY)
                continue
            try:
                self._checkpoint()
            except Exception as error:  # noqa: BLE001 - syncs go on meanwhile
                self._complain(error)
                self._checkpoint_at = time.monotonic() + _RETRY
            if time.monotonic() >= self._checkpoint_at:
                self._recovered()

    def _complain(self, error: Exception) -> None:
        ours = error if isinstance(error, OutboxError) else outbox_error(self._path, error)
        self._complaints.tell(
            "disk",
            logging.ERROR,
            "syncing or checkpointing fails, and is tried again; a power cut may cost what was recorded:"
            f" {ours}",
        )

    def _recovered(self) -> None:
        lasted = self._complaints.over("disk")
        if lasted is not None:
            log.info("outbox %s: what was recorded is safe on disk again after %s", self._path, lasted)

    def _renew(self) -> None:
        """After a failed sync, move everything into the main file and begin an empty WAL.

        The kernel drops what it could not write and reports that once: the next sync would succeed
        without it, and nothing that follows a gap in the WAL survives a power cut.
        """
        if not self._in_doubt:
            return
        with self._alone() as alone:
            if not alone or not self._truncate():
                raise OSError(errno.EBUSY, "the write-ahead log cannot be renewed after a failed sync")
        with self._sync_lock:
            descriptor = self._wal_descriptor()
            if descriptor is not None:
                os.fsync(descriptor)  # its new length, too: old frames must not come back
            self._in_doubt = False

    def _stopped_within(self, seconds: float) -> bool:
        with suppress(_threads.Empty):
            self._stop.get(timeout=seconds)
        return self._stopping

    def _checkpoint(self) -> None:
        if not self.checkpoints or self._committed - self._checkpointed < CHECKPOINT_COMMITS:
            return
        if time.monotonic() < self._checkpoint_at:
            return
        try:
            with self._alone() as alone:
                if alone:
                    self._checkpoint_alone()
        except Exception as error:
            # It syncs, too, and SQLite would take the next one's success for this one's.
            code = getattr(error.__cause__ or error, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_IOERR_FSYNC:
                self._in_doubt = True
            raise

    def _checkpoint_alone(self) -> None:
        self._mark()
        with self._checkpoint_lock:
            # Another file in its place has the same -shm by name: opening that would cut the one that is
            # mapped here, and the next record() would die of SIGBUS.
            if not self._is_same_file() or not self.is_alone():
                return
            self._checkpointed = self._committed
            connection = connect(self._path)
            try:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            finally:
                connection.close()
        with suppress(FileNotFoundError):  # closed for a fork, and not yet used again
            if os.stat(self._wal_path).st_size > WAL_LIMIT:  # noqa: PTH116
                self._truncate()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep all others from checkpointing, in this process and elsewhere; False if one is at it.

        SQLite up to 3.51.2 can corrupt a file when a checkpoint finds nothing to do in the instant in which
        a writer restarts the WAL (SQLite's documentation, "The WAL-Reset Bug"). So before each checkpoint
        something is committed, and nobody else's checkpoint may come between.
        """
        try:  # on the WAL, where SQLite has no locks: a lock file would be one more to own and to lose
            with self._sync_lock:  # no fork may come between: the child must know what to close
                self._guard = os.open(self._wal_path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # closed for a fork, and not yet used again
            yield False
            return
        try:
            yield _lock(self._guard)
        finally:
            with self._sync_lock:  # no fork may come between these, either
                guard, self._guard = self._guard, None
                fcntl.flock(guard, fcntl.LOCK_UN)  # else a copy that a fork in C has made would keep it
                os.close(guard)

    def is_alone(self) -> bool:
        """Tell whether the WAL is still the one that was locked against other checkpoints."""
        with suppress(OSError):
            now = os.stat(self._wal_path)  # noqa: PTH116
            return self._guard is not None and os.path.samestat(os.fstat(self._guard), now)
        return False

    def close(self) -> None:
        """Stop the thread and sync what it had not."""
        self._stopping = True
        self._stop.put(None)
        self._wake.put(None)
        if self._thread is not None and not _threads.is_current(self._thread):
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
        for descriptor in (self._wal, self._guard):
            if descriptor is not None:
                with suppress(OSError):
                    os.close(descriptor)
        self._wal = self._guard = None
        self._reset()


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def truncate(connection: sqlite3.Connection) -> bool:
    """Empty the WAL, unless a reader or writer in another process is in the way; tell whether it is empty."""
    (in_the_way, _, _) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not in_the_way
