"""``perqueue record``."""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, BinaryIO

import click

from perqueue._words import counted
from perqueue.cli._failure import Failure, Misuse, failure, silence_stdout, why
from perqueue.cli._options import examples, is_embedded, outbox_option
from perqueue.exceptions import PerQueueError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._recorder import PerQueue

_COLUMNS = ["billing_id", "user_id", "activity_type_id"]


@click.command(
    short_help="Record one activity, or many with -.",
    epilog=examples(
        "perqueue record GROUP_A USER_1",
        "perqueue record -t ACTIVITY_TYPE_ID -- GROUP_A -user-with-a-dash",
        "printf 'GROUP_A\\tUSER_1\\nGROUP_A\\tUSER_2\\n' | perqueue record -",
        "perqueue record - --csv < activities.csv",
    ),
)
@click.argument("billing_id")
@click.argument("user_id", required=False)
@outbox_option
@click.option(
    "--activity-type",
    "-t",
    "kind",
    envvar=["PER_ACTIVITY_TYPE_ID", "ACTIVITY_TYPE_ID"],
    show_envvar=True,
    metavar="ID",
    help="The activity type.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Standard input is CSV, not tab-separated.")
def record(billing_id: str, user_id: str | None, outbox: str, kind: str | None, *, as_csv: bool) -> None:
    """Record one activity, or with - one for each line of standard input.

    Needs no token and no network: `perqueue drain`, or any program that has the outbox open, delivers.
    Prints each activity's number in the outbox, once it is stored.

    Lines hold a billing ID, a user ID and, if it differs, an activity type. A line of column names
    (billing_id, user_id, activity_type_id) is skipped, and so are blank lines. The first bad line
    ends it: those before it are recorded. If standard output fails, it goes on recording.
    """
    batch = billing_id == "-"
    if batch and user_id is not None:
        raise click.UsageError("with - there is no USER_ID: the lines say who.")
    if not batch and (user_id is None or as_csv):
        raise click.UsageError("--csv goes with -." if as_csv else "Missing argument 'USER_ID'.")
    if not batch and kind is None:
        raise click.UsageError("Missing option '--activity-type' / '-t' (env var: 'PER_ACTIVITY_TYPE_ID').")

    from perqueue._recorder import PerQueue

    queue = PerQueue(outbox, activity_type_id=kind, drain=False, embedded=is_embedded(outbox))
    try:
        if user_id is not None:
            _record_one(queue, billing_id, user_id)
        elif sys.stdin is None:
            raise Misuse("standard input is closed: there are no lines to record")
        else:
            _record_lines(queue, sys.stdin.buffer, as_csv=as_csv)
    finally:
        queue.close()


def _record_one(queue: PerQueue, billing_id: str, user_id: str) -> None:
    receipt = queue.record(billing_id, user_id)
    try:
        click.echo(receipt.id)
    except OSError as error:
        silence_stdout()
        raise Failure(f"activity {receipt.id} is recorded, but standard output: {why(error)}") from error


def _record_lines(queue: PerQueue, lines: BinaryIO, *, as_csv: bool) -> None:
    done = 0
    unprinted: OSError | None = None
    rows = csv.reader(
        _decoded(lines),
        strict=True,
        delimiter="," if as_csv else "\t",
        quoting=csv.QUOTE_MINIMAL if as_csv else csv.QUOTE_NONE,
    )
    try:
        for row in rows:
            if not row or (done == 0 and row == _COLUMNS[: len(row)]):
                continue
            billing_id, user_id, kind = _parts(row)
            receipt = queue.record(billing_id, user_id, activity_type_id=kind)
            done += 1
            unprinted = unprinted or _printed(receipt.id)
    except UnicodeDecodeError as error:  # the next line, which the reader has not got
        raise Misuse(_at_line(rows.line_num + 1, "it is not UTF-8", done)) from error
    except (csv.Error, Failure) as error:
        raise Misuse(_at_line(rows.line_num, str(error), done)) from error
    except OSError as error:  # of reading: that of printing is not raised
        raise Failure(_at_line(rows.line_num + 1, f"standard input: {why(error)}", done)) from error
    except PerQueueError as error:
        raise failure(error, _at_line(rows.line_num, str(error), done)) from error
    if unprinted is not None:
        raise Failure(f"all recorded ({counted(done, 'activity')}), but standard output: {why(unprinted)}")


def _printed(number: int) -> OSError | None:
    """Print a number, or return why not: recording goes on, for the activities matter more."""
    try:
        click.echo(number)
    except OSError as error:
        silence_stdout()
        return error
    return None


def _parts(row: list[str]) -> tuple[str, str, str | None]:
    if not 2 <= len(row) <= 3:
        fields = counted(len(row), "field")
        raise Failure(f"{fields}, not a billing ID, a user ID and perhaps an activity type")
    return row[0], row[1], (row[2] or None) if len(row) == 3 else None


def _decoded(lines: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(lines):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def _at_line(number: int, why: str, done: int) -> str:
    return f"line {number}: {why}; recorded before it: {counted(done, 'activity')}"
