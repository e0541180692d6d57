"""Reading all of an outbox file from outside, without changing it: what is wrong, and what to do about it."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sqlite3
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from perqueue._activity import State, checksum
from perqueue._outbox.connection import APPLICATION_ID, SCHEMA_VERSION
from perqueue._outbox.counts import read_position
from perqueue._outbox.damage import is_sound
from perqueue._outbox.finding import ok, problem, size, warning
from perqueue._outbox.flow import delivery, refusals, times
from perqueue._outbox.pages import Pages
from perqueue._outbox.queries import OLDEST_FRESH
from perqueue._words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._outbox.finding import Finding
    from perqueue._outbox.flow import Known

SALVAGE = "stop the programs that use it, then `perqueue doctor --salvage NEW_FILE` rescues what can be read"
_GIVEN_UP = (
    "`perqueue history` has what is legible of them: record them again if you know them. A salvage finds more"
    " only if the file itself is damaged. `perqueue status --check --max-damaged N` is healthy in spite of N"
)
_LARGE_WAL = 8 * 2**20
_NO_PLACE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)


def holders_of(path: Path, kind: str) -> set[int]:
    """Return the processes that hold locks of a kind (``POSIX``, ``FLOCK``) on a file.

    0 stands for one of another container. Empty also where the system does not tell.
    """
    holders = set()
    with suppress(OSError):  # Linux: see proc_locks(5)
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            fields = line.replace("-> ", "").split()
            if fields[1] == kind and fields[5].rpartition(":")[2] == inode:
                holders.add(max(0, int(fields[4])))
    return holders


def users_of(path: Path) -> set[int]:
    """Return the processes that have the file open as a database, as :func:`holders_of` does.

    By SQLite's own locks; but without a write-ahead log a connection that is idle holds none.
    """
    return holders_of(path, "POSIX") | _openers_of(path)


def _openers_of(path: Path) -> set[int]:
    """Return the processes that have a file open, as far as this user may see them."""
    status = path.stat()
    openers = set()
    # Linux: see proc_pid_fd(5). Not Path.glob(), which raises when a process ends meanwhile.
    for link in map(Path, glob.iglob("/proc/[0-9]*/fd/*")):  # noqa: PTH207
        with suppress(OSError):
            if link.readlink().name == path.name and os.path.samestat(link.stat(), status):
                openers.add(int(link.parts[2]))
    return openers


def wal(path: Path, users: set[int]) -> Iterator[Finding]:
    """Look at the write-ahead log beside a file that these processes use."""
    try:
        length = path.with_name(f"{path.name}-wal").stat().st_size
    except FileNotFoundError:
        yield ok("wal", "no write-ahead log: everything is in the file itself")
        return
    if length > _LARGE_WAL:
        remedy = "look for a process that reads the file and does not end"
        yield warning("wal", f"the write-ahead log has grown to {size(length)}", remedy)
    else:
        yield ok("wal", f"write-ahead log of {size(length)}")
    if not users:  # otherwise it may be written just now
        with Pages(path) as pages:
            if pages.unread_frames:
                text = (
                    f"{pages.unread_frames} pages at the end of the write-ahead log cannot be read by SQLite:"
                    " damage, or writes that a power cut interrupted"
                )
                yield problem("wal", text, f"before anything else opens the file: {SALVAGE}")


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    reader = sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, isolation_level=None)
    reader.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return reader


@contextmanager
def _reader(path: Path, users: set[int]) -> Iterator[sqlite3.Connection]:
    """Open the file for reading: itself, or a copy where SQLite can make no -shm beside it, or has no log."""
    with ExitStack() as stack:
        reader = stack.enter_context(closing(_connect(path, "mode=ro")))
        try:
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if _code(error) not in _NO_PLACE or users or _is_interrupted(error):
                raise
            mode = "mode=ro&immutable=1"  # which ignores a -wal
            wal = path.with_name(f"{path.name}-wal")
            if wal.exists() and wal.stat().st_size:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="perqueue-doctor-")))
                shutil.copyfile(wal, folder / wal.name)
                path = Path(shutil.copyfile(path, folder / path.name))
                mode = "mode=ro"
            path.open("rb").close()  # says it if this user may not read it
            reader = stack.enter_context(closing(_connect(path, mode)))
        else:
            if reader.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                reader = stack.enter_context(_copied(reader, path))
        yield reader


@contextmanager
def _copied(reader: sqlite3.Connection, path: Path) -> Iterator[sqlite3.Connection]:
    """Copy a file whose writers have to wait for whoever reads it: for the copy, and not for all the rest."""
    with TemporaryDirectory(prefix="perqueue-doctor-") as folder:
        if shutil.disk_usage(folder).free < 2 * path.stat().st_size:
            message = f"there is no room in {folder} for a copy of it: TMPDIR may name another place"
            raise OSError(errno.ENOSPC, message)
        with closing(_connect(Path(folder, "copy.db"), "mode=rwc")) as copy:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_master").fetchone()  # a lock, with its time-out
            reader.backup(copy)
            reader.close()
            yield copy


def _code(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF


def is_embedded(path: Path) -> bool:
    """Tell whether a file is an application's own, as far as it can be read."""
    if not path.stat().st_size:  # SQLite would delete its -wal
        return False
    with suppress(sqlite3.Error), closing(_connect(path, "mode=ro")) as reader:
        (application_id,) = reader.execute("PRAGMA application_id").fetchone()
        return application_id != APPLICATION_ID and not _is_foreign(reader)
    return False


def _is_interrupted(error: Exception) -> bool:
    """Tell whether there is half a transaction in the file, with the journal to undo it beside it."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK


def _is_foreign(reader: sqlite3.Connection) -> bool:
    """Tell whether this is a sound database of something else."""
    names = [str(name) for (name,) in reader.execute("SELECT tbl_name FROM sqlite_master")]
    return not any(name.startswith("perqueue_") for name in names)


def contents(
    path: Path, users: set[int], now: int, known: Known, *, drained: bool | None
) -> Iterator[Finding]:
    """Yield what there is to say about what the file holds; ``now`` is in milliseconds.

    ``drained`` is whether somebody delivers, if that is known. What was learned goes into ``known``. Raises
    :class:`OSError` if this user may not look.
    """
    if not path.stat().st_size:  # SQLite would delete its -wal
        yield problem("contents", "the file is empty", SALVAGE)
        return
    try:
        with _reader(path, users) as reader:
            reader.execute("BEGIN")  # everything below is said of one moment
            if _is_foreign(reader):
                yield problem("contents", "not an outbox: it holds something else", "is the path right?")
                return
            yield _header(reader, known)
            yield _structure(reader)
            yield from _rows(reader)
            yield from _hollow(reader)
            read_position(reader)
            yield from _books(reader)
            yield from refusals(reader)
            yield from delivery(reader, now, known, drained=drained)
            yield from times(reader, now)
    except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
        code = _code(error)
        if _is_interrupted(error):
            text = "not looked at: a transaction was cut short, and whoever opens the file to write undoes it"
            yield warning("contents", text, "`perqueue status`, then look again")
            return
        if code in _NO_PLACE:
            in_use = "; it is in use, and only who may write beside it can look then" if users else ""
            raise PermissionError(f"{error}{in_use}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            yield warning("contents", f"not looked at: {error}", "try again")
            return
        if code == sqlite3.SQLITE_NOTADB:
            text = "not an outbox: it is not even a SQLite file, or its beginning is damaged"
            yield problem("contents", text, f"is the path right? If it is: {SALVAGE}")
            return
        what = "its schema is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        yield problem("contents", f"it cannot be read to the end: {what}", SALVAGE)


def _header(reader: sqlite3.Connection, known: Known) -> Finding:
    version, origin, made = reader.execute(
        "SELECT schema_version, origin, created_at FROM perqueue_outbox"
    ).fetchone()
    known.legible, known.origin = True, origin
    text = f"outbox of {origin or 'no origin yet'}, schema {version}, made {made}"
    if version > SCHEMA_VERSION:
        return problem("outbox", f"{text}: a newer perqueue made it", "use that version")
    if version < SCHEMA_VERSION:
        text += f"; the next program that opens it brings it to schema {SCHEMA_VERSION}"
    return ok("outbox", text)


def _structure(reader: sqlite3.Connection) -> Finding:
    lines = [str(line) for (line,) in reader.execute("PRAGMA integrity_check(5)")]
    if lines == ["ok"]:
        return ok("structure", "SQLite finds the file in order")
    return problem("structure", f"the file is damaged: {' '.join(' '.join(lines).split())[:300]}", SALVAGE)


def _rows(reader: sqlite3.Connection) -> Iterator[Finding]:
    rows = reader.execute(
        "SELECT billing_id, user_id, activity_type_id, recorded_at, checksum FROM perqueue_activity"
    )
    looked = bad = 0
    for *parts, check in rows:
        looked += 1
        bad += check != checksum(*parts)
    outcomes = reader.execute(
        "SELECT activity_id, state, settled_at, transaction_id, reason, checksum FROM perqueue_settlement"
    )
    wrong = sum(not is_sound(row) for row in outcomes)
    if bad:
        text = f"not what was recorded: {bad:,} of {counted(looked, 'activity')}; kept, and never sent"
        yield problem("rows", text, "record them again if you know them; nothing else depends on it")
    else:
        yield ok("rows", f"{counted(looked, 'activity')} as recorded")
    if wrong:
        yield problem("rows", f"{counted(wrong, 'outcome')} not as stored", SALVAGE)


def _hollow(reader: sqlite3.Connection) -> Iterator[Finding]:
    """Compare what is known of activities with the activities themselves."""
    query = "SELECT {} WHERE activity_id NOT IN (SELECT id FROM perqueue_activity)"
    rows = reader.execute(query.format("state, count(*) FROM perqueue_settlement") + " GROUP BY state")
    counts = dict(rows.fetchall())
    (waiting,) = reader.execute(query.format("count(*) FROM perqueue_retry")).fetchone()
    lost = waiting + counts.get(State.REJECTED, 0)
    known = counts.get(State.ACCEPTED, 0) + counts.get(State.DISCARDED, 0)
    if lost:
        yield problem("rows", f"{counted(lost, 'pending or rejected activity')} without a row", SALVAGE)
    if known:
        text = f"of {counted(known, 'accepted or discarded activity')} nothing but the outcome is left"
        yield warning("rows", text, "nothing has to be delivered")


def _books(reader: sqlite3.Connection) -> Iterator[Finding]:
    accepted, rejected, discarded, damaged, missing, pruned, through = reader.execute(
        "SELECT accepted, rejected, discarded, damaged, missing, pruned, drained_through FROM perqueue_drain"
    ).fetchone()
    stored = dict(reader.execute("SELECT state, count(*) FROM perqueue_settlement GROUP BY state").fetchall())
    (last,) = reader.execute("SELECT coalesce(max(id), 0) FROM perqueue_activity").fetchone()
    (waiting,) = reader.execute("SELECT count(*) FROM perqueue_retry").fetchone()
    (fresh,) = reader.execute(
        "SELECT count(*) FROM perqueue_activity a"
        " WHERE NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
        " AND NOT EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = a.id)"
    ).fetchone()
    oldest = reader.execute(OLDEST_FRESH, (0,)).fetchone()
    pending = last - accepted - rejected - discarded - damaged - missing
    kept = stored.get(State.ACCEPTED, 0) + stored.get(State.DISCARDED, 0)
    balanced = (
        accepted + discarded == kept + pruned
        and rejected == stored.get(State.REJECTED, 0)
        and damaged == stored.get(State.DAMAGED, 0)
        and pending == fresh + waiting
    )
    text = f"by the counters {pending:,} are pending, by the tables {fresh + waiting:,}"
    if not balanced:
        yield problem("books", f"counters and tables do not agree: {text}", SALVAGE)
    elif oldest is not None and oldest[0] <= through:
        text = f"activity {oldest[0]} is pending below the mark up to which everything is said to be settled"
        yield problem("books", text, SALVAGE)
    else:
        yield ok("books", f"counters and tables agree: {pending:,} pending, {accepted:,} accepted")
    if damaged or missing:
        text = f"{counted(damaged, 'activity')} found damaged, {missing:,} missing: not delivered"
        yield problem("damage", text, _GIVEN_UP)
