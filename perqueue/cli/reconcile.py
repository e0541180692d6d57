"""``perqueue reconcile``."""

from __future__ import annotations

from dataclasses import asdict
from datetime import time, timedelta
from typing import TYPE_CHECKING, Any

import click

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE
from perqueue.cli._options import (
    DURATION,
    check_comparable,
    examples,
    existing,
    json_option,
    moment,
    need_token,
    outbox_option,
)

if TYPE_CHECKING:
    from perqueue._reconcile import Reconciliation

_HEADINGS = {
    "activity_type_id": "activity type",
    "billing_id": "billing ID",
    "per_unique": "Per",
    "delivered_unique": "delivered",
    "recorded_unique": "recorded",
    "late": "late",
    "uncertain": "uncertain",
    "pending": "pending",
    "rejected": "rejected",
    "verdict": "verdict",
}
_ONLY_IF_ANY = ("late", "uncertain", "pending", "rejected")


@click.command(
    short_help="Compare Per's report with what this outbox recorded.",
    epilog=examples(
        "perqueue reconcile",
        "perqueue reconcile --start 2018-12-01 --end 2018-12-31",
        "perqueue reconcile --json | jq '.rows[] | select(.verdict == \"unexplained\")'",
    ),
)
@outbox_option
@click.option("--start", metavar="DATE", help="First moment: 2018-12-01 or 2018-12-01T00:00:00Z.")
@click.option("--end", metavar="DATE", help="Last moment; a bare date includes that day. Needs --start.")
@click.option(
    "--tolerance",
    type=DURATION,
    default=0,
    metavar="DURATION",
    help="How far Per's clock may differ from this machine's: 1s, 2m. [default: not at all]",
)
@json_option
@click.pass_context
def reconcile(
    context: click.Context,
    outbox: str,
    start: str | None,
    end: str | None,
    tolerance: float,
    *,
    as_json: bool,
) -> None:
    """Compare Per's report with what this outbox recorded and delivered, and explain each difference.

    Without a period: the whole prior calendar month, as Per defines it. Dates without a time zone are in UTC.
    All numbers are unique users. Per dates an activity by its arrival: "late" are those recorded before a
    boundary of the period and sent after it, "uncertain" those on their way at that moment. "rejected"
    includes discarded ones. Columns that are 0 throughout are left out of the table.

    Exit code 0: every number matches or is explained. 1: one is not, because something else feeds the same
    account, or the trail does not reach back that far. Needs PER_REPORTING_TOKEN; only reads.
    """
    if end is not None and start is None:
        raise click.UsageError("--end needs --start.")
    need_token("PER_REPORTING_TOKEN", "reporting")
    path = existing(outbox)
    check_comparable(path)
    from perqueue._client import PerClient
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._reconcile import reconcile as compare

    with PerClient() as per:
        period = moment(start), moment(end, time.max)
        found = compare(path, per.get_report, *period, SYSTEM_CLOCK, timedelta(seconds=tolerance))
    if as_json:
        _print.as_json(as_plain(found))
    else:
        _show(found)
    if found.unexplained:
        context.exit(NOT_DONE)


def as_plain(found: Reconciliation) -> dict[str, Any]:
    """Return what `--json` prints."""
    return {
        "start": _print.iso(found.start),
        "end": _print.iso(found.end),
        "complete": found.complete,
        "damaged": found.damaged,
        "rows": [asdict(row) for row in found],
    }


def _show(found: Reconciliation) -> None:
    click.echo(f"{_print.iso(found.start)} to {_print.iso(found.end) or 'now'}", err=True)
    rows = [asdict(row) for row in found]
    if not rows:
        click.echo("No activity in this period, at Per or in this outbox.", err=True)
        return
    kinds = {row["activity_type_id"] for row in rows}
    names = [name for name in _HEADINGS if name not in _ONLY_IF_ANY or any(row[name] for row in rows)]
    if len(kinds) == 1:
        click.echo(f"activity type {_print.printable(kinds.pop())}", err=True)
        names.remove("activity_type_id")
    _print.table([_HEADINGS[name] for name in names], [[row[name] for name in names] for row in rows])
    notes: dict[str, list[str]] = {}
    for row in rows:
        kind = f" ({row['activity_type_id']})" if "activity_type_id" in names else ""
        notes.setdefault(row["note"], []).append(f"{row['billing_id']}{kind}")
    notes.pop("", None)
    if notes:
        click.echo()
    for note, whose in notes.items():
        click.echo(_print.printable(f"{', '.join(whose)}: {note}."))
    if not found.complete:
        lost = f"are damaged ({found.damaged:,})" if found.damaged else "are no longer in this outbox"
        click.echo(f"The trail is incomplete: of this period, some activities {lost}.", err=True)
