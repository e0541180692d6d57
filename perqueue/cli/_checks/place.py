"""Where the outbox lies: owner, mode, folder, file system, room."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue import _place
from perqueue._outbox.examine import is_embedded
from perqueue._outbox.finding import ok, problem, size, warning
from perqueue._words import counted
from perqueue.exceptions import OutboxMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from perqueue._outbox.finding import Finding

_LITTLE_ROOM = 64 * 2**20
_FEW_FILES = 100
_BESIDE = ("-wal", "-shm", "-setup.lock", "-drain.lock")


def look(path: Path) -> Iterator[Finding]:
    """Look at the file from outside; raises :class:`OSError` if this user may not."""
    embedded = is_embedded(path)
    yield _file(path, embedded=embedded)
    yield from _beside(path, embedded=embedded)
    yield from _folder(path)
    yield _file_system(path)
    yield from _room(path)


def _file(path: Path, *, embedded: bool) -> Finding:
    status = path.stat()
    mode = stat.S_IMODE(status.st_mode)
    text = f"mode {mode:04o}, owner {_name(status.st_uid)}, {size(status.st_size)}"
    if embedded:
        return ok("file", f"{text}: the application's, with an outbox in it")
    if mode & 0o077:
        return problem("file", f"{text}: others can open it", f"chmod 600 {path}")
    return ok("file", text)


def _beside(path: Path, *, embedded: bool) -> Iterator[Finding]:
    """Look at the files that belong to it: a program of its owner's must be able to open them."""
    owner = path.stat().st_uid
    for suffix in _BESIDE:
        beside = path.with_name(f"{path.name}{suffix}")
        try:
            status = beside.lstat()
        except FileNotFoundError:
            continue
        if status.st_uid != owner:
            text = f"{beside.name} belongs to {_name(status.st_uid)}, and the outbox to {_name(owner)}"
            yield problem("beside", text, f"stop who made it, then chown {_name(owner)} {beside}")
        if not embedded and suffix == "-wal" and status.st_size and status.st_mode & 0o077:
            text = f"{beside.name}: mode {stat.S_IMODE(status.st_mode):04o}: others can open it"
            yield problem("beside", text, f"chmod 600 {beside}")


def _folder(path: Path) -> Iterator[Finding]:
    folder = path.parent
    mode = folder.stat().st_mode
    text = f"{folder}: mode {stat.S_IMODE(mode):04o}"
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield problem("folder", f"{text}: anybody can replace or delete the outbox", f"chmod o-w {folder}")
    elif mode & stat.S_IWOTH:
        remedy = "put it into a folder of the program's own"
        yield warning("folder", f"{text}: anybody can put files beside the outbox", remedy)
    elif not os.access(folder, os.W_OK):
        remedy = "whoever records or delivers must be able to make files there: look as that user"
        yield warning("folder", f"{text}: this user ({_name(os.geteuid())}) cannot write there", remedy)
    else:
        yield ok("folder", text)


def _file_system(path: Path) -> Finding:
    mount_point, kind = _place.mount_of(path)
    try:
        _place.examine(path, quiet=True)
    except OutboxMismatch as error:
        return problem("place", str(error), "until then perqueue does not open it")
    if kind in _place.WARNINGS:
        what, _, remedy = _place.WARNINGS[kind].partition(": ")
        return warning("place", f"it {what} ({kind})", remedy)
    return ok("place", f"{kind or 'unknown file system'} at {mount_point or 'an unknown mount point'}")


def _room(path: Path) -> Iterator[Finding]:
    system = os.statvfs(path)
    free = system.f_bavail * system.f_frsize
    text = f"{size(free)} are left on its file system"
    if free < _LITTLE_ROOM:
        remedy = "free space: recording and delivery go on by themselves"
        yield problem("room", text, remedy)
    elif system.f_files and system.f_favail < _FEW_FILES:  # some file systems have no such number
        text = f"{text}, but room for {counted(system.f_favail, 'file')} only (inodes)"
        yield problem("room", text, "delete small files: SQLite must be able to make three beside the outbox")
    else:
        yield ok("room", text)


def _name(user: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(user).pw_name
    return str(user)
