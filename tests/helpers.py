"""Real child processes, acknowledgements over pipes, and waiting for what must come true."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from perqueue.sandbox import Sandbox

PREAMBLE = """\
import os, signal, sys, threading, time
import perqueue
from perqueue import *

def say(what):
    os.write(1, f"{what}\\n".encode())

def hear():
    return sys.stdin.readline().strip()

"""
"""What every child's script begins with. Its queue takes its options from the environment: PerQueue()."""
BECOME = "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
"""The script of an isolated child that is to run a file or a module, by its arguments."""


def until(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Return the first true value of a condition; fail, saying what did not happen, after ``timeout``."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.005)
    return value


def free_port() -> int:
    """Return a port for a server that starts later; until then no outgoing connection is given it."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", random.randrange(10_000, lowest)))
            port: int = listener.getsockname()[1]
            return port


def quickest(attempt: Callable[[], object], most: float, tries: int = 3) -> float:
    """Return in how many seconds the quickest of some attempts ended; one in less than ``most`` is the last.

    A busy machine is late once in a while. Whoever does not keep a time is late at each attempt.
    """

    def seconds() -> float:
        began = time.monotonic()
        attempt()
        return time.monotonic() - began

    return least(seconds, most, tries)


def least(measure: Callable[[], float], most: float, tries: int = 3) -> float:
    """Return the least of some measurements; one of less than ``most`` is the last."""
    best = float("inf")
    for _ in range(tries):
        best = min(best, measure())
        if best < most:
            break
    return best


def environment(outbox: Path, per: Sandbox | None, **more: str) -> dict[str, str]:
    """Return the environment variables with which ``PerQueue()`` delivers that outbox to that sandbox."""
    options = {"PERQUEUE_OUTBOX": str(outbox), "PER_ACTIVITY_TYPE_ID": "TYPE"}
    if per is not None:
        options |= {"PER_BASE_URL": per.url, "PER_ACTIVITY_TOKEN": per.activity_token}
    return options | more


class Lines:
    """The lines that come out of a pipe, read without a thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self._lines: list[str] = []
        self.ended = False

    def pump(self, timeout: float) -> bool:
        """Wait for more; tell whether any came before the time was up or the pipe ended."""
        if self.ended or not select.select([self._descriptor], [], [], max(0.0, timeout))[0]:
            return False
        chunk = os.read(self._descriptor, 1 << 20)
        self.ended = not chunk
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines += [line.decode() for line in lines]
        return bool(chunk)

    def next(self, timeout: float) -> str | None:
        """Return the next line; None if there is none in time."""
        deadline = time.monotonic() + timeout
        while not self._lines:
            if not self.pump(deadline - time.monotonic()) and (self.ended or time.monotonic() >= deadline):
                return None
        return self._lines.pop(0)

    def rest(self, timeout: float = 10.0) -> list[str]:
        """Return every further line, once all writers of the pipe are gone."""
        deadline = time.monotonic() + timeout
        while not self.ended:
            assert time.monotonic() < deadline, "somebody still holds the pipe"
            self.pump(deadline - time.monotonic())
        lines, self._lines = self._lines, []
        return lines


class Child:
    """A Python program in a process of its own."""

    def __init__(
        self,
        script: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        pass_fds: Iterable[int] = (),
        wrapper: Iterable[str] = (),
        isolated: bool = False,
        measured: bool = True,
    ) -> None:
        """Start it; without coverage's measuring if that would hang on a lock of its own (signals, forks)."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        code = textwrap.dedent(script) if isolated else PREAMBLE + textwrap.dedent(script)
        unwanted = ("PER_", "PERQUEUE_") if measured else ("PER_", "PERQUEUE_", "COVERAGE_", "COV_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-c", code, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**clean, **(env or {})},
            pass_fds=tuple(pass_fds),
        )
        assert self.process.stdout is not None
        self._output = Lines(self.process.stdout.fileno())
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._errors.close()

    def expect(self, start: str, timeout: float = 15.0) -> str:
        """Return the rest of the next line, which must begin so."""
        line = self._output.next(timeout)
        assert line is not None, f"the child did not say {start!r} within {timeout:g} s; {self.errors()}"
        assert line.startswith(start), f"the child said {line!r} instead of {start!r}; {self.errors()}"
        return line[len(start) :].strip()

    def silent(self, timeout: float) -> bool:
        """Tell whether the child says nothing for so long."""
        return self._output.next(timeout) is None

    def tell(self, line: object) -> None:
        """Write a line that the child's ``hear()`` returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def kill(self) -> None:
        """End it as ``kill -9`` does; without effect on one that has ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def wait(self, timeout: float = 15.0) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the child has not ended within {timeout:g} s; {self.errors()}") from None

    def succeed(self, timeout: float = 15.0) -> list[str]:
        """Return what it says until it ends, which it must do without any complaint."""
        code = self.wait(timeout)
        errors = self.errors()
        assert (code, errors) == (0, ""), f"exit code {code}: {errors}"
        return self._output.rest()

    def errors(self) -> str:
        """Return what it wrote to stderr so far."""
        # pread: the child's descriptor shares the position of this file.
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace").strip()


class AckPipe:
    """A pipe on which children acknowledge, with ``os.write``, what they have recorded."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_inheritable(self.writer, True)
        self._lines = Lines(self._reader)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_writer()
        os.close(self._reader)

    def _close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def drain(self, seconds: float) -> None:
        """Keep the pipe from filling up for so long."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._lines.pump(left)

    def acknowledged(self) -> list[str]:
        """Return all acknowledgements, once every child that could write them is gone."""
        self._close_writer()
        return self._lines.rest()


def users(per: Sandbox) -> list[str]:
    """Return the user IDs in a sandbox's ledger, in order of acceptance, every repeat too."""
    return [activity.user_id for activity in per.activities]


def repeats(per: Sandbox) -> int:
    """Count the deliveries beyond the first of each user."""
    received = users(per)
    return len(received) - len(set(received))


def lines_of_json(lines: Iterable[str]) -> Iterator[Any]:
    """Parse one JSON value a line."""
    return (json.loads(line) for line in lines)
