"""Looking at an outbox file from outside, without changing it: what is wrong, and what to do about it."""

from __future__ import annotations

import os
import pwd
import shutil
import sqlite3
import stat
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from perqueue import _lock, _place
from perqueue._activity import State, checksum
from perqueue._clock import datetime_from_ms
from perqueue._outbox.connection import APPLICATION_ID, SCHEMA_VERSION
from perqueue._outbox.counts import read_position
from perqueue._outbox.damage import is_sound
from perqueue._outbox.pages import Pages
from perqueue._outbox.queries import OLDEST_FRESH
from perqueue.exceptions import OutboxMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator

SALVAGE = "stop the programs that use it, then `perqueue doctor --salvage NEW_FILE` rescues what can be read"
_LITTLE_ROOM = 64 * 2**20
_LARGE_WAL = 8 * 2**20
_OLD = 5 * 60_000
_NO_PLACE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM)
_WAL_RESET_BUG = ((3, 7, 0), (3, 51, 2))


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; nothing has to be done."""
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    text: str
    remedy: str | None = None


def _ok(about: str, text: str) -> Finding:
    return Finding(about=about, level=Level.OK, text=text)


def _note(about: str, text: str, remedy: str | None = None) -> Finding:
    return Finding(about=about, level=Level.NOTE, text=text, remedy=remedy)


def _problem(about: str, text: str, remedy: str) -> Finding:
    return Finding(about=about, level=Level.PROBLEM, text=text, remedy=remedy)


def users_of(path: Path) -> set[int]:
    """Return the processes that have the file open as a database; 0 stands for one of another container.

    Empty also where the system does not tell. By SQLite's own locks, which every open connection holds.
    """
    users = set()
    with suppress(OSError):  # Linux: see proc_locks(5)
        inode = str(path.stat().st_ino)
        for line in Path("/proc/locks").read_text("ascii").splitlines():
            fields = line.replace("-> ", "").split()
            if fields[1] == "POSIX" and fields[5].rpartition(":")[2] == inode:
                users.add(max(0, int(fields[4])))
    return users


def examine(path: Path, now: int) -> Iterator[Finding]:
    """Yield what there is to say about the outbox at a real path that exists; ``now`` is in milliseconds.

    Raises :class:`OSError` if this user may not look.
    """
    embedded = _is_embedded(path)
    yield _file(path, embedded=embedded)
    yield _where(path)
    yield _room(path)
    users = users_of(path)
    yield _use(path, users)
    yield from _wal(path, users)
    yield _sqlite(embedded=embedded)
    yield from _contents(path, users, now)


def _is_embedded(path: Path) -> bool:
    if not path.stat().st_size:  # SQLite would delete its -wal
        return False
    with suppress(sqlite3.Error), closing(_connect(path, "mode=ro")) as reader:
        (application_id,) = reader.execute("PRAGMA application_id").fetchone()
        return application_id != APPLICATION_ID and not _is_foreign(reader)
    return False


def _file(path: Path, *, embedded: bool) -> Finding:
    status = path.stat()
    owner = str(status.st_uid)
    with suppress(KeyError):
        owner = pwd.getpwuid(status.st_uid).pw_name
    mode = stat.S_IMODE(status.st_mode)
    text = f"mode {mode:04o}, owner {owner}, {_size(status.st_size)}"
    if embedded:
        return _ok("file", f"{text}: the application's, with an outbox in it")
    if mode & 0o077:
        return _problem("file", f"{text}: others can open it", f"chmod 600 {path}")
    return _ok("file", text)


def _where(path: Path) -> Finding:
    mount_point, kind = _place.mount_of(path)
    try:
        _place.examine(path, quiet=True)
    except OutboxMismatch as error:
        return _problem("place", str(error), "until then perqueue does not open it")
    if kind in _place.WARNINGS:
        return _note("place", f"it {_place.WARNINGS[kind]} ({kind})")
    return _ok("place", f"{kind or 'unknown file system'} at {mount_point or 'an unknown mount point'}")


def _room(path: Path) -> Finding:
    system = os.statvfs(path)
    free = system.f_bavail * system.f_frsize
    if free < _LITTLE_ROOM:
        return _problem("room", f"{_size(free)} are left on its file system", "free space")
    return _ok("room", f"{_size(free)} are left on its file system")


def _use(path: Path, users: set[int]) -> Finding:
    drained = _lock.is_drained(path)
    delivers = {True: "one process delivers", False: "nobody delivers", None: "this user may not see who"}
    names = ", ".join(f"process {pid}" if pid else "a process of another container" for pid in sorted(users))
    return _ok("use", f"open in {names or 'no process'}; {delivers[drained]}")


def _wal(path: Path, users: set[int]) -> Iterator[Finding]:
    wal = path.with_name(f"{path.name}-wal")
    try:
        size = wal.stat().st_size
    except FileNotFoundError:
        yield _ok("wal", "no write-ahead log: everything is in the file itself")
        return
    if size > _LARGE_WAL:
        remedy = "look for a process that reads the file and does not end"
        yield _note("wal", f"the write-ahead log has grown to {_size(size)}", remedy)
    else:
        yield _ok("wal", f"write-ahead log of {_size(size)}")
    if not users:  # otherwise it may be written just now
        with Pages(path) as pages:
            if pages.unread_frames:
                text = (
                    f"{pages.unread_frames} pages at the end of the write-ahead log cannot be read by SQLite:"
                    " damage, or writes that a power cut interrupted"
                )
                yield _problem("wal", text, f"before anything else opens the file: {SALVAGE}")


def _sqlite(*, embedded: bool) -> Finding:
    text = f"SQLite {sqlite3.sqlite_version}"
    first, last = _WAL_RESET_BUG
    if first <= sqlite3.sqlite_version_info <= last and embedded:
        text += " has the WAL-reset bug, as for every application with several connections in WAL mode"
        return _note("sqlite", text, "use SQLite 3.51.3")
    if first <= sqlite3.sqlite_version_info <= last:
        text += " has the WAL-reset bug, which perqueue itself avoids"
        return _note("sqlite", text, "let no other program write to the file, or use SQLite 3.51.3")
    return _ok("sqlite", text)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    reader = sqlite3.connect(f"{path.as_uri()}?{mode}", uri=True, isolation_level=None)
    reader.text_factory = lambda raw: raw.decode("utf-8", "surrogateescape")
    return reader


@contextmanager
def _reader(path: Path, users: set[int]) -> Iterator[sqlite3.Connection]:
    """Open the file for reading: itself, or, where SQLite can make no -shm beside it, a copy."""
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
        yield reader


def _code(error: Exception) -> int:
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF


def _is_interrupted(error: Exception) -> bool:
    """Tell whether there is half a transaction in the file, with the journal to undo it beside it."""
    return getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK


def _is_foreign(reader: sqlite3.Connection) -> bool:
    """Tell whether this is a sound database of something else."""
    names = [str(name) for (name,) in reader.execute("SELECT tbl_name FROM sqlite_master")]
    return not any(name.startswith("perqueue_") for name in names)


def _contents(path: Path, users: set[int], now: int) -> Iterator[Finding]:
    if not path.stat().st_size:  # SQLite would delete its -wal
        yield _problem("contents", "the file is empty", SALVAGE)
        return
    try:
        with _reader(path, users) as reader:
            reader.execute("BEGIN")  # everything below is said of one moment
            if _is_foreign(reader):
                yield _problem("contents", "not an outbox: it holds something else", "is the path right?")
                return
            yield _header(reader)
            yield _structure(reader)
            yield from _rows(reader)
            yield from _hollow(reader)
            read_position(reader)
            yield from _books(reader)
            yield from _delivery(reader, now)
    except (sqlite3.Error, TypeError, ValueError, OverflowError) as error:
        code = _code(error)
        if _is_interrupted(error):
            text = "not looked at: a transaction was cut short, and whoever opens the file to write undoes it"
            yield _note("contents", text, "`perqueue status`, then look again")
            return
        if code in _NO_PLACE:
            in_use = "; it is in use, and only who may write beside it can look then" if users else ""
            raise PermissionError(f"{error}{in_use}") from error
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            yield _note("contents", f"not looked at: {error}", "try again")
            return
        if code == sqlite3.SQLITE_NOTADB:
            text = "not an outbox: it is not even a SQLite file, or its beginning is damaged"
            yield _problem("contents", text, f"is the path right? If it is: {SALVAGE}")
            return
        what = "its schema is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        yield _problem("contents", f"it cannot be read to the end: {what}", SALVAGE)


def _header(reader: sqlite3.Connection) -> Finding:
    version, origin, made = reader.execute(
        "SELECT schema_version, origin, created_at FROM perqueue_outbox"
    ).fetchone()
    text = f"outbox of {origin or 'no origin yet'}, schema {version}, made {made}"
    if version > SCHEMA_VERSION:
        return _problem("outbox", f"{text}: a newer perqueue made it", "use that version")
    return _ok("outbox", text)


def _structure(reader: sqlite3.Connection) -> Finding:
    lines = [str(line) for (line,) in reader.execute("PRAGMA integrity_check(5)")]
    if lines == ["ok"]:
        return _ok("structure", "SQLite finds the file in order")
    return _problem("structure", f"the file is damaged: {' '.join(' '.join(lines).split())[:300]}", SALVAGE)


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
        text = f"{bad:,} of {looked:,} activities are not what was recorded: they are kept, and never sent"
        yield _problem("rows", text, "record them again if you know them; nothing else depends on it")
    else:
        yield _ok("rows", f"{looked:,} activities are as they were recorded")
    if wrong:
        yield _problem("rows", f"{wrong:,} outcomes are not what was stored", SALVAGE)


def _hollow(reader: sqlite3.Connection) -> Iterator[Finding]:
    """Compare what is known of activities with the activities themselves."""
    query = "SELECT {} WHERE activity_id NOT IN (SELECT id FROM perqueue_activity)"
    rows = reader.execute(query.format("state, count(*) FROM perqueue_settlement") + " GROUP BY state")
    counts = dict(rows.fetchall())
    (waiting,) = reader.execute(query.format("count(*) FROM perqueue_retry")).fetchone()
    lost = waiting + counts.get(State.REJECTED, 0)
    known = counts.get(State.ACCEPTED, 0) + counts.get(State.DISCARDED, 0)
    if lost:
        yield _problem("rows", f"{lost:,} pending or rejected activities have no row", SALVAGE)
    if known:
        text = f"of {known:,} accepted or discarded activities nothing but the outcome is left"
        yield _note("rows", text, "nothing has to be delivered")


def _books(reader: sqlite3.Connection) -> Iterator[Finding]:
    accepted, rejected, discarded, damaged, missing, pruned, through = reader.execute(
        "SELECT accepted, rejected, discarded, damaged, missing, pruned, drained_through FROM perqueue_drain"
    ).fetchone()
    counted = dict(
        reader.execute("SELECT state, count(*) FROM perqueue_settlement GROUP BY state").fetchall()
    )
    (last,) = reader.execute("SELECT coalesce(max(id), 0) FROM perqueue_activity").fetchone()
    (waiting,) = reader.execute("SELECT count(*) FROM perqueue_retry").fetchone()
    (fresh,) = reader.execute(
        "SELECT count(*) FROM perqueue_activity a"
        " WHERE NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
        " AND NOT EXISTS (SELECT 1 FROM perqueue_retry r WHERE r.activity_id = a.id)"
    ).fetchone()
    oldest = reader.execute(OLDEST_FRESH, (0,)).fetchone()
    pending = last - accepted - rejected - discarded - damaged - missing
    kept = counted.get(State.ACCEPTED, 0) + counted.get(State.DISCARDED, 0)
    balanced = (
        accepted + discarded == kept + pruned
        and rejected == counted.get(State.REJECTED, 0)
        and damaged == counted.get(State.DAMAGED, 0)
        and pending == fresh + waiting
    )
    text = f"by the counters {pending:,} are pending, by the tables {fresh + waiting:,}"
    if not balanced:
        yield _problem("books", f"counters and tables do not agree: {text}", SALVAGE)
    elif oldest is not None and oldest[0] <= through:
        text = f"activity {oldest[0]} is pending below the mark up to which everything is said to be settled"
        yield _problem("books", text, SALVAGE)
    else:
        yield _ok("books", f"counters and tables agree: {pending:,} pending, {accepted:,} accepted")
    if damaged or missing:
        text = (
            f"{damaged:,} activities were found damaged and {missing:,} are missing: they are not delivered"
        )
        yield _problem("damage", text, SALVAGE if damaged else "nothing can be done for those")
    if rejected:
        yield _note("rejected", f"Per refused {rejected:,} activities", "perqueue rejected list")


def _delivery(reader: sqlite3.Connection, now: int) -> Iterator[Finding]:
    kind, reason, until = reader.execute(
        "SELECT hold, hold_reason, hold_until FROM perqueue_drain"
    ).fetchone()
    row: tuple[Any, Any] = reader.execute(
        "SELECT min(a.recorded_at), max(a.recorded_at) FROM perqueue_activity a"
        " WHERE NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
    ).fetchone()
    oldest, newest = row
    if kind is not None and oldest is not None:
        text = f"delivery waits until {_moment(until)} ({kind.replace('_', ' ')}: {reason})"
        remedies = {"bad_token": "give it a token that Per knows", "refused": "correct the activity type"}
        if kind in remedies:
            yield _problem("delivery", text, remedies[kind])
        else:
            yield _note("delivery", text, "it goes on by itself when Per answers")
    elif oldest is not None and now - oldest > _OLD:
        remedy = "see that a program with this outbox runs, or `perqueue drain`"
        yield _problem("delivery", f"the oldest pending activity is of {_moment(oldest)}", remedy)
    else:
        yield _ok("delivery", "nothing has been waiting for long")
    if newest is not None and newest > now + 60_000:
        text = f"an activity is dated {_moment(newest)}, and now is {_moment(now)}"
        yield _problem("clock", text, "set the clock: ages and waits are wrong, nothing else")


def _moment(milliseconds: int) -> str:
    return datetime_from_ms(milliseconds).isoformat(sep=" ", timespec="seconds")


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
