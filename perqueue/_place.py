"""Where an outbox lies: a place that would lose it, damage it or give it away is refused, or named once."""

from __future__ import annotations

import logging
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from perqueue.exceptions import OutboxMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("perqueue")

# SQLite's WAL mode needs memory that all users of the file share, and locks that hold: neither crosses a
# network (SQLite's documentation, "Write-Ahead Logging"). Two hosts on one file corrupt it, unnoticed.
_NETWORK = frozenset({
    "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse", "glusterfs", "goofys", "gpfs",
    "juicefs", "lustre", "mount-s3", "ncpfs", "nfs", "nfs4", "orangefs", "rclone", "s3fs", "seaweedfs",
    "smb2", "smb3", "smbfs", "sshfs",
})  # fmt: skip
_IN_MEMORY = "lies in memory, and goes with the next restart: put it on a disk, or on a volume"
_IN_A_CONTAINER = "lies in a container's own layer, and goes with the container: put it on a volume"
_OF_THE_HOST = (
    "lies in a folder shared with this machine's host: let no program outside this machine open it, for that"
    " would damage it, or put it on a disk of this machine's own"
)
WARNINGS = {
    **dict.fromkeys(("ramfs", "tmpfs"), _IN_MEMORY),
    **dict.fromkeys(("aufs", "fuse-overlayfs", "overlay"), _IN_A_CONTAINER),
    **dict.fromkeys(("9p", "fakeowner", "grpcfuse", "osxfs", "prl_fs", "vboxsf", "virtiofs"), _OF_THE_HOST),
    "vmhgfs-fuse": _OF_THE_HOST,
}
_BESIDE = ("-wal", "-shm", "-journal", "-setup.lock", "-drain.lock")

_warned: set[tuple[str, str]] = set()


def real_path(path: Path) -> Path:
    """Follow symbolic links, once and for all.

    Raises :class:`OutboxMismatch` for one in a directory that everybody may write, where anybody could
    have planted it.
    """
    for part in (path, *path.parents):
        if os.path.islink(part) and _is_everybodys(part.parent):  # noqa: PTH114 - Path's raises, this does not
            message = (
                f"outbox {path}: {part} is a symbolic link that anybody could have made: give the real path"
            )
            raise OutboxMismatch(message)
    return Path(os.path.realpath(path))


def examine(path: Path, *, quiet: bool) -> None:
    """Look at the place of an outbox that is about to be opened or created, by its real path.

    Raises :class:`OutboxMismatch` if it is another user's, on a network, or mounted without its directory.
    Unless ``quiet``, warns of a place that does not last, once for each place in a process.
    """
    _examine_owner(path)
    mount_point, kind = mount_of(path)
    if kind in _NETWORK:
        message = (
            f"outbox {path} lies on a network file system ({kind}), which SQLite's write-ahead log does not"
            " survive: put it on a local disk or volume"
        )
        raise OutboxMismatch(message)
    if mount_point == str(path):
        message = (
            f"outbox {path} is mounted by itself, so that the files beside it, which hold the latest"
            " activities, lie elsewhere: mount its directory"
        )
        raise OutboxMismatch(message)
    if not quiet and kind in WARNINGS:
        _warn(path, (mount_point, kind), f"{WARNINGS[kind]} ({kind})")


def _examine_owner(path: Path) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        status = None
    user = os.geteuid()
    if not _is_everybodys(path.parent):
        # The superuser may look after anybody's.
        if status is not None and stat.S_ISREG(status.st_mode) and user not in (0, status.st_uid):
            _refuse_owner(path, status.st_uid)
        return
    for each in (path, *(path.with_name(f"{path.name}{suffix}") for suffix in _BESIDE)):
        with suppress(FileNotFoundError):
            status = each.lstat()
            if stat.S_ISLNK(status.st_mode) or status.st_uid != user:
                _refuse_owner(each, status.st_uid)


def _refuse_owner(path: Path, owner: int) -> NoReturn:
    message = (
        f"{path} belongs to another user ({owner}, and this process is {os.geteuid()}), or anybody could have"
        " made it: give the outbox to the user that records, in a directory of that user's"
    )
    raise OutboxMismatch(message)


def _is_everybodys(directory: Path) -> bool:
    with suppress(OSError):
        return bool(directory.stat().st_mode & stat.S_IWOTH)
    return False


def mount_of(path: Path) -> tuple[str, str]:
    """Return mount point and type of the file system that a path lies on; empty if nobody knows."""
    found = ("", "")
    text = f"{path}/"
    for mount_point, kind in _mounts():
        if text.startswith(f"{mount_point.rstrip('/')}/") and len(mount_point) >= len(found[0]):
            found = mount_point, kind  # of several on one directory, the last is on top
    return found


def _mounts() -> Iterator[tuple[str, str]]:
    try:  # Linux: see proc_pid_mountinfo(5)
        lines = Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return
    for line in lines:
        mount, separator, source = line.partition(" - ")
        if separator:
            kind = source.split(" ")[0].removeprefix("fuse.")
            yield re.sub(r"\\([0-7]{3})", _unescaped, mount.split(" ")[4]), kind


def _unescaped(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def _warn(path: Path, place: tuple[str, str], what: str) -> None:
    if place not in _warned:
        _warned.add(place)
        log.warning("outbox %s %s", path, what)


def make_for_owner(beside: str, path: Path) -> None:
    """Make a lock file beside somebody else's outbox theirs, too: only the superuser can, and must."""
    if os.geteuid() != 0:
        return
    with suppress(FileExistsError):
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
        descriptor = os.open(beside, flags, 0o600)
        try:
            status = path.stat()
            os.fchown(descriptor, status.st_uid, status.st_gid)
            os.fchmod(descriptor, 0o600)
        finally:
            os.close(descriptor)
