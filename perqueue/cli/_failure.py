"""From an exception to one line on stderr and an exit code."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from perqueue.exceptions import ConfigurationError, InvalidActivity, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_DONE = 1
"""Exit code: what was asked for did not hold."""
MISUSE = 2
"""Exit code: the command, an option or the configuration is wrong."""


class Failure(click.ClickException):
    """Ends the command with one line on stderr."""

    def __init__(self, message: str, exit_code: int = NOT_DONE) -> None:
        super().__init__(" ".join(message.split()))
        self.exit_code = exit_code


def failure(error: PerQueueError) -> Failure:
    """Return what an error of the library becomes on the command line."""
    misuse = isinstance(error, ConfigurationError | InvalidActivity)
    return Failure(str(error), MISUSE if misuse else NOT_DONE)


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
        raise Failure(f"{error.format_message()} See '{path} --help'.", MISUSE) from error


class Commands(click.Group):
    """A group whose commands fail with one line, and are listed in the order of their use."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names in the order in which they were added."""
        return list(self.commands)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments before the command's name."""
        with _one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the rest, and run the command."""
        with _one_line():
            return super().invoke(ctx)
