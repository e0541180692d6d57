"""``perqueue report``."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE, Failure, Misuse
from perqueue.cli._options import check_comparable, examples, existing, json_option, moment, need_token

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from perqueue._address import DatabaseURL
    from perqueue._report import Report
    from perqueue.cli._findings import Findings
    from perqueue.cli._series import By, Span, Step

_COLUMNS = ("activity_type_id", "billing_id", "unique")
_SERIES_COLUMNS = ("period_start", "period_end", *_COLUMNS, "error")
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
        "perqueue report --start 2018-12-01 --end 2018-12-31 --by day",
        "perqueue report --last 7d --csv > usage.csv",
        "perqueue report --by day --outbox activities.db --html usage.html",
    )
)
@click.option("--start", metavar="DATE", help="First moment: 2018-12-01 or 2018-12-01T00:00:00Z.")
@click.option("--end", metavar="DATE", help="Last moment; a bare date includes that day. Needs --start.")
@click.option("--last", type=_Span(), metavar="SPAN", help="The time up to now: 24h, 7d, 4w.")
@click.option(
    "--by",
    type=click.Choice(["day", "week", "month"]),
    help="Also show each day, week (from Monday) or month of the period, in UTC.",
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV; with --by, the series.")
@click.option("--html", metavar="FILE", help="Write a page to look at, print and send; - is standard output.")
@click.option(
    "--outbox",
    "-o",
    envvar="PERQUEUE_OUTBOX",
    metavar="PATH",
    help="With --html or --json: compare with this outbox. [env var, for --html only: PERQUEUE_OUTBOX]",
)
@click.pass_context
def report(
    context: click.Context,
    start: str | None,
    end: str | None,
    last: timedelta | None,
    by: By | None,
    *,
    as_json: bool,
    as_csv: bool,
    html: str | None,
    outbox: str | None,
) -> None:
    """Ask Per how many unique users each billing ID had.

    Without a period: the whole prior calendar month, as Per defines it. Dates without a time zone are
    in UTC. What is still in the outbox is not counted: `perqueue drain` first where that matters.

    Per counts each user once in a period, so the numbers of days do not add up to that of their month. --by
    asks Per once for each step, 400 at most, one after the other. A step without an answer is named, and the
    exit code is 1. Needs PER_REPORTING_TOKEN, and no outbox.
    """
    if last is not None and (start is not None or end is not None):
        raise click.UsageError("--last is a period of its own: leave out --start and --end.")
    if end is not None and start is None:
        raise click.UsageError("--end needs --start.")
    if as_json + as_csv + (html is not None) > 1:
        raise click.UsageError("--json, --csv or --html: one of them.")
    need_token("PER_REPORTING_TOKEN", "reporting")
    write = None if html is None else _writer(html)
    path = _outbox(context, outbox, html=html is not None, as_json=as_json)
    first = datetime.now(UTC) - last if last is not None else moment(start)
    found = _find(first, moment(end, time.max), by, path)
    if write is not None:
        write(found)
    elif as_json:
        _print.as_json(_plain(found))
    elif as_csv:
        _as_csv(found)
    else:
        _show(found)
    _complain(found)
    if found.failed:
        context.exit(NOT_DONE)


def _outbox(
    context: click.Context, outbox: str | None, *, html: bool, as_json: bool
) -> Path | DatabaseURL | None:
    """Return the outbox to compare with; one that the environment names is for the page, if it is there."""
    if outbox is None:
        return None
    if context.get_parameter_source("outbox") is ParameterSource.COMMANDLINE:
        if not (html or as_json):
            raise click.UsageError("--outbox needs --html or --json; for a table see `perqueue reconcile`.")
        return existing(outbox)
    if not html:
        return None
    try:
        return existing(outbox)
    except Misuse as error:
        click.echo(f"Without a comparison: {error.format_message()}.", err=True)
        return None


def _writer(target: str) -> Callable[[Findings], None]:
    """Return what writes the page; before Per is asked, because it may be impossible."""
    try:
        from perqueue.cli._page import render
    except ImportError as error:
        message = f"--html needs {error.name}: pip install 'useper-perqueue[report]'"
        raise Misuse(message) from None
    if target == "-":
        return lambda found: click.echo(render(found), nl=False)
    if not Path(target).absolute().parent.is_dir():
        message = f"there is no directory for {target}"
        raise Misuse(message)
    if Path(target).is_dir():
        message = f"--html {target}: that is a directory; name a file in it"
        raise Misuse(message)

    def write(found: Findings) -> None:
        from perqueue.cli._replace import replace

        page = render(found)
        replace(Path(target), page)
        click.echo(f"{target}: {max(1, len(page) // 1000):,} kB", err=True)

    return write


def _find(
    start: datetime | str | None, end: datetime | str | None, by: By | None, outbox: Path | DatabaseURL | None
) -> Findings:
    from perqueue._client import PerClient
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._report import checked_moment
    from perqueue._settings import DEFAULT_BASE_URL, origin_of
    from perqueue.cli._findings import Findings, Noted
    from perqueue.cli._series import spans

    noted, compared = Noted(), None
    with PerClient() as per:  # which has checked the URL
        origin = origin_of(os.environ.get("PER_BASE_URL") or DEFAULT_BASE_URL)
        if outbox is None:
            usage = per.get_report(start, end)
        else:
            from perqueue._reconcile import reconcile

            check_comparable(outbox)
            said: list[Report] = []

            def ask(*period: datetime | str | None) -> Report:
                said.append(per.get_report(*period))
                return said[0]

            compared = reconcile(outbox, ask, start, end, SYSTEM_CLOCK, notebook=noted)
            noted.look_up(outbox)
            usage = said[0]
        now = datetime.now(UTC)
        first = usage.start if start is None else checked_moment("start", start)
        last = _to_the_millisecond(usage.end if start is None else checked_moment("end", end))
        steps: list[Step] = []
        if by is not None:
            if first is None or first.tzinfo is None or (last is not None and last.tzinfo is None):
                raise Failure("the report does not say which period it is of: name one with --start")
            steps = list(_asked(per.get_report, spans(first, last, by, now)))
    return Findings(
        origin=origin,
        asked_at=now,
        usage=usage,
        start=first,
        end=last,
        by=by,
        steps=steps,
        outbox=outbox,
        reconciliation=compared,
        noted=noted,
    )


def _to_the_millisecond(moment: datetime | None) -> datetime | None:
    """Return a moment as Per is asked for it."""
    return None if moment is None else moment.replace(microsecond=moment.microsecond // 1000 * 1000)


def _asked(get_report: Callable[..., Report], wanted: Sequence[Span]) -> Iterator[Step]:
    """Yield the steps, and show on a terminal how far it is."""
    from perqueue.cli._series import ask

    steps = ask(get_report, wanted)
    if not sys.stderr.isatty():
        yield from steps
        return
    with click.progressbar(steps, length=len(wanted), label="Asking Per", file=sys.stderr) as shown:
        yield from shown


def _plain(found: Findings) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "start": found.usage.raw.get("start"),
        "end": found.usage.raw.get("end"),
        "rows": _rows(found.usage),
    }
    if found.by is not None:
        shown |= {"by": found.by, "steps": [_plain_step(step) for step in found.steps]}
    if found.reconciliation is not None:
        from perqueue.cli.reconcile import as_plain

        shown["reconciliation"] = as_plain(found.reconciliation)
    return shown


def _rows(usage: Report) -> list[dict[str, Any]]:
    return [asdict(row) for row in usage.rows()]


def _plain_step(step: Step) -> dict[str, Any]:
    return {
        "start": _print.iso(step.span.start),
        "end": _print.iso(step.span.end),
        "whole": step.span.whole,
        "rows": None if step.usage is None else _rows(step.usage),
        "error": step.error,
    }


def _as_csv(found: Findings) -> None:
    if found.by is None:
        _print.as_csv(_COLUMNS, ([row[name] for name in _COLUMNS] for row in _rows(found.usage)))
    else:
        _print.as_csv(_SERIES_COLUMNS, _series_rows(found))


def _series_rows(found: Findings) -> Iterator[list[Any]]:
    for step in found.steps:
        period = [_print.iso(step.span.start), _print.iso(step.span.end)]
        if step.usage is None:
            yield [*period, None, None, None, step.error]
        else:
            for row in _rows(step.usage):
                yield [*period, *(row[name] for name in _COLUMNS), None]


def _show(found: Findings) -> None:
    usage = found.usage
    click.echo(f"{usage.raw.get('start')} to {usage.raw.get('end') or 'now'}", err=True)
    rows = _rows(usage)
    if not rows and not any(step.usage is not None and step.usage.rows() for step in found.steps):
        click.echo("No activity in this period.", err=True)
        return
    if _print.to_terminal():
        try:
            from perqueue.cli._bars import paint
        except ImportError:  # the plain table, then
            pass
        else:
            paint(found)
            return
    _print.table(_COLUMNS, [[row[name] for name in _COLUMNS] for row in rows])
    if found.by is not None:
        click.echo()
        steps = [[row[0][:10], *row[2:5]] for row in _series_rows(found) if row[5] is None]
        _print.table([found.by, *_COLUMNS], steps)
        click.echo(_print.NO_SUM, err=True)


def _complain(found: Findings) -> None:
    failed = found.failed
    if failed:
        click.echo(f"Per did not answer for {len(failed)} of {len(found.steps)} steps:", err=True)
    for step in failed[:5]:
        click.echo(f"  {step.span.start:%Y-%m-%d}: {_print.printable(step.error or '')}", err=True)
    if len(failed) > 5:
        click.echo(f"  … and {len(failed) - 5} more", err=True)
