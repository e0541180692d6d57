"""``perqueue status``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE
from perqueue.cli._options import DURATION, Seconds, examples, existing, json_option, outbox_option

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue.cli._check import Limits
    from perqueue.cli._sight import Sight

_INTERVAL = 2.0
_MAX_AGE = 300.0


@click.command(
    short_help="Show what is pending, who delivers it, and why not.",
    epilog=examples(
        "perqueue status --outbox activities.db",
        "perqueue status --json | jq .pending",
        "perqueue status --watch",
        "perqueue status --check --max-age 15m",
    ),
)
@outbox_option
@json_option
@click.option("--watch", "watching", is_flag=True, help="Look again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=Seconds(0.1, 86400),
    metavar="SECONDS",
    help="With --watch: seconds between two looks. [default: 2]",
)
@click.option(
    "--check", "checking", is_flag=True, help="Print one line, and say by the exit code if all is well."
)
@click.option(
    "--max-age",
    type=DURATION,
    metavar="DURATION",
    help="With --check: how long the oldest may be pending, such as 30s, 5m, 2h or 1d. [default: 5m]",
)
@click.option(
    "--max-pending", type=click.IntRange(min=0), metavar="N", help="With --check: how many may be pending."
)
@click.option(
    "--max-damaged",
    type=click.IntRange(min=0),
    metavar="N",
    help="With --check: how many may be damaged, for those that are known and given up. [default: 0]",
)
@click.pass_context
def status(
    context: click.Context,
    outbox: str,
    *,
    interval: float | None,
    max_age: float | None,
    max_pending: int | None,
    max_damaged: int | None,
    as_json: bool,
    watching: bool,
    checking: bool,
) -> None:
    """Show what an outbox holds, whether it is being delivered, and if not, why.

    Needs no token, asks nobody but the file, and costs the same however much is in it. It only reads, and
    keeps nothing open between two looks. While something is pending in the last 24 hours of a month (UTC),
    it warns: Per counts by arrival, so what is late counts in the next month (`month_end` in --json).

    With --watch it shows trend, rates, answer times and the last errors in a terminal, elsewhere one line
    for each look (with --json: one object). A file that is not there yet is waited for. Ctrl-C or SIGTERM
    ends it with exit code 0.

    With --check it is for probes. Exit code 0: healthy. 1: not, and the one line says why and what to do:
    the oldest has been pending for too long, too many are, delivery is paused (a bad token, everything
    refused), activities are damaged, or the outbox is missing or cannot be read. 2: an option is wrong.
    Nothing pending is healthy, also when nobody drains.
    """
    from perqueue._settings import outbox_place

    if watching and checking:
        raise click.UsageError("--watch or --check, not both.")
    if interval is not None and not watching:
        raise click.UsageError("--interval is for --watch.")
    if not checking and (max_age, max_pending, max_damaged) != (None, None, None):
        raise click.UsageError("--max-age, --max-pending and --max-damaged are for --check.")
    if checking:
        from perqueue.cli._check import Limits

        age = _MAX_AGE if max_age is None else max_age
        if not _healthy(outbox_place(outbox), Limits(age, max_pending, max_damaged or 0), as_json=as_json):
            context.exit(NOT_DONE)
        return
    if watching:
        from perqueue.cli._watch import watch

        watch(outbox_place(outbox), interval or _INTERVAL, as_json=as_json)
        return
    path = existing(outbox)

    from perqueue._outbox import open_to_look
    from perqueue.cli._sight import fields, see

    sight = see(open_to_look(path), path)
    shown = fields(sight) | {"outbox": str(path)}
    if as_json:
        _print.as_json(shown)
    else:
        _show(shown, sight)


def _healthy(path: Path | DatabaseURL, limits: Limits, *, as_json: bool) -> bool:
    from perqueue.cli._check import check, tell

    verdict, sight = check(path, limits)
    tell(verdict, sight, path, as_json=as_json)
    return verdict.healthy


def _show(shown: dict[str, Any], sight: Sight) -> None:
    pending, oldest = f"{shown['pending']:,}", shown["oldest_pending_age"]
    if oldest is not None:
        pending += f", the oldest for {_print.age(oldest)}"
    rejected = f"{shown['rejected']:,}" + ("  (perqueue rejected list)" if shown["rejected"] else "")
    lines = {
        "outbox": shown["outbox"],
        "origin": shown["origin"] or "none yet",
        "state": _state(shown, sight.now / 1000),
        "drainer": _drainer(shown, sight.drainer),
        "pending": pending,
        "delivered": f"{shown['delivered']:,}",
        "rejected": rejected,
        "discarded": f"{shown['discarded']:,}",
        "damaged": f"{shown['damaged']:,}" + ("  (perqueue doctor)" if shown["damaged"] else ""),
    }
    if shown["month_end"] is not None:
        lines["warning"] = _warning(shown["month_end"], shown["pending"], sight.now / 1000)
    for name, value in lines.items():
        click.echo(f"{name:<10} {_print.printable(value)}")


def _warning(end: datetime, pending: int, now: float) -> str:
    left = _print.age(end.timestamp() - now)
    return (
        f"{pending:,} pending, and the month ends in {left}: what Per has not got by then counts in {end:%B}"
    )


def _state(shown: dict[str, Any], now: float) -> str:
    text = str(shown["state"]).replace("_", " ")
    if shown["reason"]:
        text += f": {shown['reason']}"
    resumes = shown["resumes_at"]
    if resumes is not None and shown["drained"]:
        wait = resumes.timestamp() - now
        text += f"; next try in {_print.age(wait)}" if wait >= 1 else "; next try now"
    return text


def _drainer(shown: dict[str, Any], drainer: str) -> str:
    if shown["drained"] is None:
        return "unknown: this user may not look at the drain lock"
    if shown["drained"]:
        return drainer
    if str(shown["state"]) == "paused":
        return "none while paused"
    return "none" + ("  (perqueue drain delivers)" if shown["pending"] else "")
