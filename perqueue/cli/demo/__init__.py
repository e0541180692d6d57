"""``perqueue demo``: an outage, a kill -9 and a recovery, live in the terminal."""

from __future__ import annotations

import sys

import click

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE, Misuse
from perqueue.cli._options import examples


@click.command(
    short_help="Watch an outage and a recovery.",
    epilog=examples("perqueue demo", "perqueue demo --activities 20000"),
)
@click.option(
    "--activities",
    type=click.IntRange(100, 1_000_000),
    default=6000,
    show_default=True,
    help="How many to record.",
)
@click.option("--plain", is_flag=True, help="Print lines instead of a live picture, as without a terminal.")
@click.option("--pace", type=click.FloatRange(0.1), default=1.0, hidden=True, help="Slower beyond 1.")
@click.option("--lose", is_flag=True, hidden=True, help="Acknowledge one activity without recording it.")
def demo(activities: int, pace: float, *, plain: bool, lose: bool) -> None:
    """Watch an outage, a kill -9 and a recovery against a local Per, and check every activity.

    Three processes record into one outbox while Per answers 503, is gone, and comes back. Then the
    process that delivers is killed in the middle of it, and started again. At the end each activity
    whose record() returned is looked up at Per. About 20 seconds; leaves nothing behind. Exit code 0
    if all of them have arrived, 1 if a single one has not.
    """
    try:
        from perqueue.cli.demo._show import perform
        from perqueue.cli.demo._view import live_view, plain_view
    except ImportError as error:
        missing = f"the demo needs {error.name}: install useper-perqueue[sandbox]"
        raise Misuse(missing) from error

    encoding = (sys.stdout.encoding or "").lower().replace("-", "")
    view = plain_view() if plain or not _print.to_terminal() or encoding != "utf8" else live_view()
    if not perform(activities, view, lose=lose, pace=pace):
        sys.exit(NOT_DONE)
