"""``perqueue history``."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from perqueue.cli import _print
from perqueue.cli._failure import Failure
from perqueue.cli._options import (
    NUMBER,
    TABLE_LIMIT,
    examples,
    json_option,
    limit_option,
    moment,
    outbox_option,
    outbox_to_read,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue._audit import ActivityRecord, Attempt

_PAGE = 1000


@click.command(
    short_help="Show what became of each activity.",
    epilog=examples(
        "perqueue history --user USER_1 --billing GROUP_A",
        "perqueue history --since 2018-12-01 --until 2019-01-01 --csv > december.csv",
        "perqueue history --id 17",
    ),
)
@outbox_option
@click.option("--user", "-u", "user_id", metavar="ID", help="Only this user ID.")
@click.option("--billing", "-b", "billing_id", metavar="ID", help="Only this billing ID.")
@click.option("--activity-type", "-t", "activity_type_id", metavar="ID", help="Only this activity type.")
@click.option("--since", metavar="DATE", help="Recorded then or later: 2018-12-01 or 2018-12-01T08:00:00Z.")
@click.option("--until", metavar="DATE", help="Recorded before then.")
@limit_option
@click.option("--id", "number", type=NUMBER, help="One activity, and every attempt.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def history(
    outbox: str,
    since: str | None,
    until: str | None,
    limit: int | None,
    number: int | None,
    *,
    as_json: bool,
    as_csv: bool,
    **ids: str | None,
) -> None:
    """Show what became of activities, in the order of their recording.

    All filters must fit. A date without a time zone is in UTC; a bare date is its midnight. The table
    leaves out IDs that all its rows share; `after` is the time from recording to Per's answer. --json and
    --csv have all columns. Settled activities are kept as long as the program's `keep_delivered` says.

    Needs no token, and only reads; programs go on recording meanwhile.
    """
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both.")
    if number is not None:
        if as_csv or since or until or limit or any(ids.values()):
            raise click.UsageError("--id names one activity: leave out filters, --limit and --csv.")
        _show_one(outbox_to_read(outbox), number, as_json=as_json)
        return
    first, beyond = moment(since), moment(until)
    if isinstance(first, datetime) and isinstance(beyond, datetime) and first >= beyond:
        raise click.UsageError("--since must be before --until.")
    wanted = {**ids, "since": first, "until": beyond}
    in_table = not (as_json or as_csv)
    most = TABLE_LIMIT + 1 if in_table and limit is None else limit
    records = _records(outbox_to_read(outbox), wanted, most)
    if as_json:
        _print.as_json_array(map(_plain, records))
    elif as_csv:
        _as_csv(records)
    else:
        shown = list(records)
        _as_table(shown[: limit or TABLE_LIMIT], hidden=[n for n, value in ids.items() if value is not None])
        if limit is None and len(shown) > TABLE_LIMIT:
            click.echo(f"These are the first {TABLE_LIMIT:,}: see --since, --limit, --csv.", err=True)


def _records(
    place: Path | DatabaseURL, wanted: dict[str, Any], limit: int | None
) -> Iterator[ActivityRecord]:
    """Yield records page by page, so that no number of them fills the memory."""
    from perqueue._audit import history as page

    after, left = 0, sys.maxsize if limit is None else limit
    while left > 0:
        size = min(left, _PAGE)
        records = page(place, after=after, limit=size, **wanted)
        yield from records
        if len(records) < size:
            return
        after, left = records[-1].id, left - size


def _plain(record: ActivityRecord) -> dict[str, Any]:
    shown = asdict(record)
    return shown | {name: _print.iso(shown[name]) for name in ("recorded_at", "settled_at")}


def _as_csv(records: Iterator[ActivityRecord]) -> None:
    from perqueue._audit import ActivityRecord

    _print.as_csv(
        [field.name for field in fields(ActivityRecord)], (_plain(each).values() for each in records)
    )


def _after(record: ActivityRecord) -> str:
    if record.settled_at is None:
        return ""
    seconds = (record.settled_at - record.recorded_at).total_seconds()
    return f"{max(0.0, seconds):.2f} s" if seconds < 10 else _print.age(seconds)


_COLUMNS: dict[str, Callable[[ActivityRecord], Any]] = {
    "id": lambda record: record.id,
    "recorded_at (UTC)": lambda record: f"{record.recorded_at:%Y-%m-%d %H:%M:%S}",
    "billing_id": lambda record: record.billing_id,
    "user_id": lambda record: record.user_id,
    "activity_type_id": lambda record: record.activity_type_id,
    "state": lambda record: record.state,
    "after": _after,
    "attempts": lambda record: record.attempts,
    "transaction or reason": lambda record: record.transaction_id or record.reason,
}


def _as_table(records: list[ActivityRecord], hidden: list[str]) -> None:
    if len({record.activity_type_id for record in records}) == 1:
        hidden.append("activity_type_id")
    if _print.to_terminal() and all(record.attempts == 1 for record in records):
        hidden.append("attempts")  # it would not fit
    columns = {name: cell for name, cell in _COLUMNS.items() if name not in hidden}
    rows = [[cell(record) for cell in columns.values()] for record in records]
    if rows:
        _print.table(list(columns), rows)
    else:
        click.echo("No such activity in this outbox.", err=True)


def _show_one(place: Path | DatabaseURL, number: int, *, as_json: bool) -> None:
    from perqueue._audit import as_attempt, as_record
    from perqueue._outbox import open_trail

    with open_trail(place) as trail:
        found = trail.trace_one(number)
    if found is None:
        message = (
            f"there is no activity {number} in this outbox: it was never recorded, or deleted in its time"
        )
        raise Failure(message)
    record, tries = _plain(as_record(found[0])), [as_attempt(each) for each in found[1]]
    if as_json:
        _print.as_json(record | {"attempt_log": [_attempt(each) for each in tries]})
        return
    for name, value in record.items():
        if value is not None:
            click.echo(f"{name:<16} {_print.printable(str(value))}")
    if tries:
        click.echo()
        _print.table(["attempted_at", "took", "result"], [_attempt_row(each) for each in tries])


def _attempt(each: Attempt) -> dict[str, Any]:
    return asdict(each) | {"attempted_at": _print.iso(each.attempted_at)}


def _attempt_row(each: Attempt) -> list[Any]:
    return [_print.iso(each.attempted_at), f"{each.duration_ms:,} ms", each.reason or "accepted"]
