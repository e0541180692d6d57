"""The recording processes, seen from the demo: what each has acknowledged, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from perqueue.sandbox import Sandbox

THREADS = 4


class User(NamedTuple):
    """One activity's identity: no other activity of the demo has it."""

    billing_id: str
    user_id: str


class Recorder:
    """One process."""

    def __init__(
        self,
        activities: Sequence[User],
        *,
        folder: Path,
        environ: Mapping[str, str],
        orders: Mapping[str, object],
    ) -> None:
        self.activities = activities
        self.acknowledged: list[User] = []
        """Those whose ``record()`` had returned."""
        self.latencies: list[int] = []
        """Nanoseconds of each of these calls."""
        self.killed = False
        self._ready = threading.Event()
        self._done = threading.Event()
        # A file, because a full pipe would stop the process, and the terminal is the picture's.
        self._complaints = folder / f"recorder-{len(list(folder.glob('recorder-*')))}.txt"
        with self._complaints.open("wb") as complaints:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "perqueue.cli.demo._recorder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                env=environ,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends it
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._tell(json.dumps({**orders, "threads": THREADS, "activities": activities}))

    @property
    def pid(self) -> int:
        """Its process ID."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def done(self) -> bool:
        """Whether it will record no more."""
        return self._done.is_set()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None  # noqa: S101 - for the type checker
        with suppress(BrokenPipeError):  # it has failed: end() says why
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        for line in self._process.stdout:
            if line == b"ready\n":
                self._ready.set()
            elif line == b"done\n":
                self._done.set()
            elif line.endswith(b"\n"):
                number, took = line.split()
                self.acknowledged.append(self.activities[int(number)])
                self.latencies.append(int(took))
        self._ready.set()
        self._done.set()

    def go(self) -> None:
        """Let it record, once it has opened the outbox."""
        self._ready.wait()
        self._tell("go")

    def kill(self) -> list[User]:
        """Kill it as the kernel does, and return what it had not acknowledged."""
        self.killed = True
        self._process.kill()
        self._wait()
        done = set(self.acknowledged)
        return [user for user in self.activities if user not in done]

    def end(self) -> str | None:
        """Let it close its outbox and end; return what went wrong, if something did."""
        if self.killed:
            return None
        self._tell("end")
        status = self._wait()
        if status == 0:
            return None
        last = self._complaints.read_text(errors="replace").strip().rpartition("\n")[2]
        return f"a recording process ended with exit code {status}: {last}"

    def _wait(self) -> int:
        status = self._process.wait()
        self._reader.join()  # the last acknowledgement was in the pipe
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        return status


def environment(per: Sandbox) -> dict[str, str]:
    """Return what has a process talk to a local Per, and to nothing else."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PER_", "PERQUEUE_"))}
    return own | {
        "PER_BASE_URL": per.url,
        "PER_ACTIVITY_TOKEN": per.activity_token,
        "PER_ACTIVITY_TYPE_ID": per.activity_type_id,
    }
