"""``perqueue report``."""

from __future__ import annotations

import csv
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime, time, timedelta

import click

from perqueue.cli import _print
from perqueue.cli._options import examples, json_option, moment, need_token

_COLUMNS = ("activity_type_id", "billing_id", "unique")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class _Span(click.ParamType[timedelta]):
    """A length of time such as 7d."""

    name = "span"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"([1-9]\d{0,4})([hdw])", str(value))
        if match is None:
            self.fail("write a number and h, d or w, such as 24h, 7d or 4w.", param, ctx)
        return int(match[1]) * _UNITS[match[2]]


@click.command(
    epilog=examples(
        "perqueue report",
        "perqueue report --start 2018-12-01 --end 2018-12-31",
        "perqueue report --last 7d --csv > usage.csv",
    )
)
@click.option("--start", metavar="DATE", help="First moment: 2018-12-01 or 2018-12-01T00:00:00Z.")
@click.option("--end", metavar="DATE", help="Last moment; a bare date includes that day. Needs --start.")
@click.option("--last", type=_Span(), metavar="SPAN", help="The time up to now: 24h, 7d, 4w.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def report(
    start: str | None, end: str | None, last: timedelta | None, *, as_json: bool, as_csv: bool
) -> None:
    """Ask Per how many unique users each billing ID had.

    Without a period: the whole prior calendar month, as Per defines it. Dates without a time zone are
    in UTC. What is still in the outbox is not counted: `perqueue drain` first where that matters.
    Needs PER_REPORTING_TOKEN, and no outbox.
    """
    if last is not None and (start is not None or end is not None):
        raise click.UsageError("--last is a period of its own: leave out --start and --end.")
    if end is not None and start is None:
        raise click.UsageError("--end needs --start.")
    if as_json and as_csv:
        raise click.UsageError("--json or --csv, not both.")
    need_token("PER_REPORTING_TOKEN", "reporting")
    first = datetime.now(UTC) - last if last is not None else moment(start)

    from perqueue._client import PerClient

    with PerClient() as per:
        usage = per.get_report(first, moment(end, time.max))
    rows = [asdict(row) for row in usage.rows()]
    if as_json:
        _print.as_json({"start": usage.raw.get("start"), "end": usage.raw.get("end"), "rows": rows})
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows([row[name] for name in _COLUMNS] for row in rows)
    else:
        click.echo(f"{usage.raw.get('start')} to {usage.raw.get('end') or 'now'}", err=True)
        if rows:
            _print.table(_COLUMNS, [[row[name] for name in _COLUMNS] for row in rows])
        else:
            click.echo("No activity in this period.", err=True)
