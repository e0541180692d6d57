"""Real application servers in processes of their own, for tests that make requests to them."""

import contextlib
import http.client
import importlib.util
import os
import signal
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import free_port, until

REQUESTS = 60


class Server:
    """A server on a free port, in a process group of its own; programs and files are found in its folder."""

    def __init__(self, tmp_path, env, *command):
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        clean = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PER_", "PERQUEUE_", "COVERAGE_", "COV_"))
        }
        # Python 3.12 and newer warn of any fork in a program with threads.
        quiet = {"PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [*(str(part).replace("PORT", str(self.port)) for part in command)],
            cwd=tmp_path,
            env={**clean, **quiet, **env, "PYTHONPATH": os.pathsep.join([str(tmp_path), *repository()])},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self):
        try:
            until(self._answers, "the server answers", 30)
        except AssertionError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def _answers(self):
        assert self.process.poll() is None, self.log()
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get("hello")

    def get(self, path, timeout=20):
        return self.request("GET", path, timeout)[1]

    def request(self, method, path, timeout=20):
        """Return the status and the body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, f"/{path}")
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def load(self, name, count=REQUESTS):
        """Make requests from four threads, and return what came back."""
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda n: self.get(f"record/{name}-{n}"), range(count)))

    def workers(self):
        """Return the process IDs of its workers."""
        helpers = ("resource_tracker", "forkserver")
        lines = {pid: _command_line(pid) for pid in children(self.process.pid)}
        return {pid for pid, line in lines.items() if line and not any(each in line for each in helpers)}

    def log(self):
        return os.pread(self._log.fileno(), 1 << 20, 0).decode(errors="replace")

    def stop(self, number=signal.SIGTERM):
        """End it gracefully; return its log."""
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server does not end: {self.log()}")
        return self.log()


def repository():
    """Return where perqueue is imported from, for a program that starts elsewhere."""
    return [str(Path(importlib.util.find_spec("perqueue").origin).parents[1])]


def children(pid):
    """Return the process IDs of a process's children, whichever of its threads has forked them."""
    found = set()
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            found |= set(map(int, (thread / "children").read_text().split()))
    return found


def _command_line(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
