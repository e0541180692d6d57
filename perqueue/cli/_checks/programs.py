"""Who has the outbox open, who delivers, and whether they are alive."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perqueue._outbox.examine import holders_of
from perqueue._outbox.finding import moment, ok, problem, warning

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from perqueue._outbox.finding import Finding

_STOPPED = ("T", "t")
"""States of a process that a signal or a debugger has stopped; see proc_pid_stat(5)."""
_THAW = "`kill -CONT {0}` thaws it (or a debugger holds it); if it is ended, another takes over within 2 s"


@dataclass(frozen=True, slots=True)
class Process:
    """A process as the system shows it; nothing but its number if it is of another container."""

    pid: int
    command: str = ""
    since: int = 0
    """When it was started (milliseconds since the epoch)."""
    frozen: bool = False

    def __str__(self) -> str:
        if not self.pid:
            return "a process of another container"
        about = f" ({self.command}, since {moment(self.since)})" if self.command else ""
        return f"process {self.pid}{about}"


def process(pid: int) -> Process:
    """Look at a process; its arguments may be secret, and are not looked at."""
    with suppress(OSError, ValueError, IndexError):
        before, _, after = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")
        fields = after.split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
        started = int((time.time() - age) * 1000)
        return Process(pid, before.partition("(")[2], started, fields[0] in _STOPPED)
    return Process(pid)


def look(path: Path, users: set[int], *, drained: bool | None) -> Iterator[Finding]:
    """Say who uses the file and who delivers."""
    drainers = holders_of(Path(f"{path}-drain.lock"), "FLOCK")
    yield _drainer(_processes(drainers), drained=drained)
    opened = _processes(users)
    frozen = [each for each in opened if each.frozen and each.pid not in drainers]
    for each in frozen:
        text = f"{each} has the outbox open and is frozen: if it holds the write lock, nobody can record"
        yield warning("use", text, f"`kill -CONT {each.pid}` thaws it")
    if not frozen:
        yield ok("use", f"open in {', '.join(map(str, opened)) or 'no process'}")


def _drainer(drainers: list[Process], *, drained: bool | None) -> Finding:
    if drained is None:
        remedy = "look as the user that the outbox belongs to"
        return warning("drainer", "this user may not see whether somebody delivers", remedy)
    if not drained:
        return ok("drainer", "nobody delivers at the moment")
    who = ", ".join(map(str, drainers)) or "a process that this user cannot see"
    frozen = next((each for each in drainers if each.frozen), None)
    if frozen is not None:
        text = f"{who} is to deliver, and is frozen: it keeps the lock, so nobody can take over"
        return problem("drainer", text, _THAW.format(frozen.pid))
    return ok("drainer", f"{who} delivers")


def _processes(pids: Iterable[int]) -> list[Process]:
    return [process(pid) for pid in sorted(pids)]


def names_of(users: set[int]) -> str:
    """Return who has to be stopped before a salvage; empty if they are of other containers, or nobody."""
    return ", ".join(f"process {pid}" for pid in sorted(users) if pid)
