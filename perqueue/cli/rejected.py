"""``perqueue rejected``: what Per refused, and what becomes of it."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._failure import Commands, Failure, Misuse
from perqueue.cli._options import (
    NUMBER,
    TABLE_LIMIT,
    examples,
    json_option,
    limit_option,
    open_as_operator,
    outbox_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

    from perqueue._activity import Activity
    from perqueue._outbox import Operator

_COLUMNS = (
    "id", "billing_id", "user_id", "activity_type_id", "recorded_at", "settled_at", "attempts", "reason"
)  # fmt: skip


def _chosen(command: Callable[..., Any]) -> Callable[..., Any]:
    ids = click.argument("ids", metavar="[NUMBER]...", nargs=-1, type=NUMBER)
    return ids(click.option("--all", "everything", is_flag=True, help="All that are rejected now.")(command))


@click.group(cls=Commands)
def rejected() -> None:
    """List, requeue or discard activities that Per refused.

    They stay in the outbox, with Per's reason, until somebody decides.
    """


@rejected.command(
    "list",
    short_help="Show what Per refused, and why.",
    epilog=examples(
        "perqueue rejected list", "perqueue rejected list --json | jq -r '.[].reason' | sort | uniq -c"
    ),
)
@outbox_option
@limit_option
@json_option
def list_rejected(outbox: str, limit: int | None, *, as_json: bool) -> None:
    """Show the activities that Per refused, in the order of its refusals, with its reasons.

    All columns are in --json.
    """
    most = limit or (sys.maxsize if as_json else TABLE_LIMIT)
    with closing(open_as_operator(outbox)) as opened:
        rejected = opened.position().rejected
        activities = opened.rejected_since(0, most)
        rows = _rows(opened, activities)
        if as_json:
            _print.as_json_array(rows)
        elif activities:
            _as_table(list(rows))
        else:
            click.echo("Nothing is rejected.", err=True)
    if not as_json and rejected > most:
        click.echo(f"These are the first {most:,} of {rejected:,}: see --limit, --json.", err=True)


def _as_table(rows: list[dict[str, Any]]) -> None:
    names = ["id", "recorded_at", "billing_id", "user_id", "activity_type_id", "reason"]
    kinds = {row["activity_type_id"] for row in rows}
    if len(kinds) == 1:
        click.echo(f"activity type {_print.printable(kinds.pop())}", err=True)
        names.remove("activity_type_id")
    shown = [row | {"recorded_at": row["recorded_at"][:19].replace("T", " ")} for row in rows]
    headings = ["recorded_at (UTC)" if name == "recorded_at" else name for name in names]
    _print.table(headings, [[row[name] for name in names] for row in shown])


def _rows(opened: Operator, activities: list[Activity]) -> Iterator[dict[str, Any]]:
    settled = opened.settled([activity.id for activity in activities])
    for activity in activities:
        end = settled.get(activity.id)
        values = (
            activity.id, activity.billing_id, activity.user_id, activity.activity_type_id,
            _moment(activity.recorded_at), None if end is None else _moment(end.settled_at),
            activity.attempts, activity.reason,
        )  # fmt: skip
        yield dict(zip(_COLUMNS, values, strict=True))


def _moment(milliseconds: int) -> str:
    from perqueue._clock import datetime_from_ms

    return _print.iso(datetime_from_ms(milliseconds))


@rejected.command(
    short_help="Send refused activities again.",
    epilog=examples(
        "perqueue rejected requeue 17 18", "perqueue rejected requeue --all --activity-type ACTIVITY_TYPE_ID"
    ),
)
@_chosen
@outbox_option
@click.option("--activity-type", "-t", "kind", metavar="ID", help="Correct the activity type of these.")
def requeue(ids: Sequence[int], outbox: str, kind: str | None, *, everything: bool) -> None:
    """Make refused activities pending again, so that they are sent anew."""
    from perqueue._activity import checked_id

    wanted = _wanted(ids, everything=everything)
    kind = None if kind is None else checked_id("activity_type_id", kind)
    with closing(open_as_operator(outbox)) as opened:
        count = opened.requeue(wanted, kind)
    _tell("requeued", count, wanted)


@rejected.command(
    short_help="Give refused activities up.",
    epilog=examples("perqueue rejected discard 17", "perqueue rejected discard --all --yes"),
)
@_chosen
@outbox_option
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def discard(ids: Sequence[int], outbox: str, *, everything: bool, yes: bool) -> None:
    """Give refused activities up: they are never sent, and stay in the audit trail as discarded."""
    wanted = _wanted(ids, everything=everything)
    if not yes and (sys.stdin is None or not sys.stdin.isatty()):
        raise Misuse("discarding cannot be undone, and there is no terminal to ask on: add --yes")
    with closing(open_as_operator(outbox)) as opened:
        if not yes:
            many = opened.position().rejected if wanted is None else len(wanted)
            click.confirm(f"Give up {counted(many, 'refused activity')} for good?", abort=True, err=True)
        count = opened.discard(wanted)
    _tell("discarded", count, wanted)


def _wanted(ids: Sequence[int], *, everything: bool) -> list[int] | None:
    if bool(ids) == everything:
        raise click.UsageError("Name activities by their numbers, or say --all.")
    return None if everything else list(dict.fromkeys(ids))


def _tell(done: str, count: int, wanted: list[int] | None) -> None:
    click.echo(f"{done} {counted(count, 'activity')}")
    if wanted is not None and count < len(wanted):
        raise Failure(f"{len(wanted) - count} of these are not rejected: see `perqueue rejected list`")
