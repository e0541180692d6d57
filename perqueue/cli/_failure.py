"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

import io
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perqueue.exceptions import AuthenticationError, ConfigurationError, InvalidActivity, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_DONE = 1
"""Exit code: what was asked for did not hold."""


_GIVEN_BY = {
    "activity_token": "PER_ACTIVITY_TOKEN",
    "reporting_token": "PER_REPORTING_TOKEN",
    "base_url": "PER_BASE_URL",
    "start": "--start",
    "end": "--end",
    "since": "--since",
    "until": "--until",
}
"""What the library calls an option, and how it is given here."""


class Failure(click.ClickException):
    """Ends the command with one line on stderr: what was asked for did not hold."""

    exit_code = NOT_DONE

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Misuse(Failure):
    """The command, an option or the configuration is wrong."""

    exit_code = 2


def failure(error: PerQueueError, message: str | None = None) -> Failure:
    """Return what an error of the library becomes on the command line."""
    misuse = isinstance(error, ConfigurationError | InvalidActivity)
    text = message or str(error)
    first, _, rest = text.partition(" ")
    if first in _GIVEN_BY:
        text = f"{_GIVEN_BY[first]} {rest}"
    elif isinstance(error, AuthenticationError):
        variable = "PER_REPORTING_TOKEN" if "reporting" in text else "PER_ACTIVITY_TOKEN"
        text = f"{text}: export one that works as {variable}, from https://useper.com/tokens"
    return (Misuse if misuse else Failure)(text)


def silence_stdout() -> None:
    """Drop what standard output does not take: Python would try again as it ends, and complain at length."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def why(error: OSError) -> str:
    """Return the operating system's words for an error."""
    return error.strerror or str(error)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except PerQueueError as error:
        raise failure(error) from error
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "perqueue"
        message = error.format_message().rstrip(".")
        stop = "" if message.endswith("?") else "."
        raise Misuse(f"{message}{stop} See '{path} --help'.") from error
    except BrokenPipeError:  # as with `| head`: click ends quietly, with exit code 1
        raise
    except OSError as error:  # of a file, it has a name
        silence_stdout()
        raise Failure(f"{error.filename or 'standard output'}: {why(error)}") from error


def _prepare_stdout() -> None:
    """Have a closed standard output swallow what is printed, and one of few characters spell out others."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as this runs
    elif isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


class Commands(click.Group):
    """A group whose commands fail with one line, and are listed in the order of their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order in which they were added."""
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments before the command's name."""
        _prepare_stdout()
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the rest, and run the command."""
        with _one_line():
            return super().invoke(ctx)
