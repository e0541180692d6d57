"""The command, in this process and in one of its own."""

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
from click.testing import CliRunner

from perqueue.cli import main
from tests.helpers import Lines, environment


@pytest.fixture
def env(outbox, per):
    """What the command needs to deliver the test's outbox to the sandbox, and to ask it for reports."""
    return environment(outbox, per, PER_REPORTING_TOKEN=per.reporting_token)


@pytest.fixture
def perqueue(env):
    """Run the command in this process: `perqueue("status", "--json")`."""

    def run(*arguments, stdin=None, **more):
        result = CliRunner().invoke(main, [str(each) for each in arguments], input=stdin, env={**env, **more})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


class Program:
    """The command in a process of its own, its output read line by line."""

    def __init__(self, arguments, env):
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith(("PER_", "PERQUEUE_"))
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "perqueue", *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**clean, **env},
        )
        self.out = Lines(self.process.stdout.fileno())
        self.err = Lines(self.process.stderr.fileno())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()

    def tell(self, line):
        self.process.stdin.write(f"{line}\n".encode())
        self.process.stdin.flush()

    def wait(self):
        """Return the exit code, and what it printed that was not read before."""
        return self.process.wait(20), self.out.rest(), self.err.rest()


@pytest.fixture
def start(env):
    """Start the command in a process of its own; killed when the test ends, if it still runs."""
    with ExitStack() as stack:
        yield lambda *arguments, **more: stack.enter_context(Program(arguments, {**env, **more}))
