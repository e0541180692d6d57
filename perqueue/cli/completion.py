"""``perqueue completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from perqueue.cli._options import examples

_VARIABLE = "_PERQUEUE_COMPLETE"
"""How click knows that a shell asks: the name is made from that of the program."""


@click.command(
    short_help="Print what a shell needs to complete commands.",
    epilog=examples(
        'eval "$(perqueue completion bash)"  # into ~/.bashrc',
        'eval "$(perqueue completion zsh)"   # into ~/.zshrc, after compinit',
        "perqueue completion fish > ~/.config/fish/completions/perqueue.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), metavar="bash|zsh|fish")
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options and paths at the Tab key."""
    completer = get_completion_class(shell)
    assert completer is not None  # noqa: S101 - click knows these three
    click.echo(completer(context.find_root().command, {}, "perqueue", _VARIABLE).source())
