"""Disks that can be filled, cut off or made to fail, and programs that are killed at a given system call."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2  # as a power cut: what is in memory stays there


def tool(name: str) -> str:
    """Return the path of a program that a test needs; skip the test if it is not installed."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"needs {name}")
    return path


def allowed(*command: object) -> None:
    """Run a command that not every machine permits; skip the test, saying why, if this one does not."""
    words = [tool(str(command[0])), *map(str, command[1:])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{' '.join(words)}: {done.stderr.strip()}")


@contextmanager
def mounted(folder: Path, *options: object) -> Iterator[Path]:
    """Mount something on a folder, new or not, for as long as the context lasts."""
    folder.mkdir(exist_ok=True)
    allowed("mount", *options, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class CutOffDisk:
    """An ext4 file system in an image, whose power can be cut."""

    def __init__(self, folder: Path) -> None:
        self.mount_point = folder / "disk"
        self._image = folder / "disk-0.img"
        self._cuts = 0
        self._mounted = False

    def __enter__(self) -> Self:
        """Make and mount it."""
        self.mount_point.mkdir()
        with self._image.open("wb") as file:
            file.truncate(24 << 20)
        allowed("mkfs.ext4", "-q", "-F", self._image)
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        """Unmount it."""
        self.unmount()

    def mount(self) -> None:
        """Mount it, which replays its journal."""
        allowed("mount", "-t", "ext4", "-o", "loop", self._image, self.mount_point)
        self._mounted = True

    def unmount(self) -> None:
        """Unmount it; nobody may have a file open on it."""
        if self._mounted:
            subprocess.run(["umount", self.mount_point], check=True)
            self._mounted = False

    def restart(self) -> None:
        """Give it power again: what had reached the disk is all there is."""
        self.unmount()
        # A copy, because another mount namespace of this machine may still hold the one that was cut off.
        self._cuts += 1
        cut_off, self._image = self._image, self._image.with_name(f"disk-{self._cuts}.img")
        shutil.copy(cut_off, self._image)
        cut_off.unlink()
        self.mount()

    def cut(self) -> None:
        """Cut the power: nothing more reaches the disk."""
        descriptor = os.open(self.mount_point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)


class Tampering:
    """Strace attached to a running program: its system calls meet a fault until the context ends."""

    def __init__(self, pid: int, fault: str) -> None:
        traced = ("-e", f"trace={fault.partition(':')[0]}", "-e", f"inject={fault}")
        self._words = [tool("strace"), "-f", "-o", "/dev/null", *traced, "-p", str(pid)]

    def __enter__(self) -> Self:
        """Return once it is attached; skip the test where that is not allowed."""
        self._strace = subprocess.Popen(self._words, stderr=subprocess.PIPE, text=True)
        assert self._strace.stderr is not None
        line = self._strace.stderr.readline()
        if "attached" not in line:
            self.__exit__()
            pytest.skip(f"strace is not allowed to attach here: {line.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of the program."""
        assert self._strace.stderr is not None
        self._strace.send_signal(signal.SIGTERM)
        self._strace.wait()
        self._strace.stderr.close()


def strace(*options: str) -> list[str]:
    """Return the command line that has strace tamper with a program's system calls."""
    return [tool("strace"), "-f", "-q", "-o", "/dev/null", *options]
