"""``perqueue doctor``: what is wrong with an outbox, and what can be saved of it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE, Failure, Misuse, silence_stdout, why
from perqueue.cli._options import examples, existing_file, json_option, outbox_option

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from perqueue._outbox.examine import Finding
    from perqueue._outbox.salvage import Salvaged


@click.command(
    epilog=examples("perqueue doctor --outbox activities.db", "perqueue doctor --salvage rescued.db")
)
@outbox_option
@json_option
@click.option(
    "--salvage",
    "new",
    metavar="NEW_FILE",
    help="Write what can be read into a new outbox, for when the file is damaged.",
)
@click.option(
    "--base-url",
    metavar="URL",
    help="Where the new file's Per is, if that is damaged, too. [default: as in the old file]",
)
@click.pass_context
def doctor(
    context: click.Context, outbox: str, new: str | None, base_url: str | None, *, as_json: bool
) -> None:
    """Look for anything wrong with an outbox, and say what to do about it.

    Reads all of it, and changes nothing. Exit code 0: nothing is wrong. 1: something is. 2: it cannot
    look, because there is no such file, or this user may not read it.

    With --salvage every activity that can still be read goes into a new file, with its outcome: what was
    pending, or whose outcome cannot be read, is pending there. The old file is only read: keep it. Stop the
    programs that use it before. If there is nothing of an outbox to be read, there is no new file.
    """
    if base_url is not None and new is None:
        raise click.UsageError("--base-url is for --salvage.")
    path = existing_file(outbox)
    if not path.is_file():
        message = f"{path} is not a regular file, and so no outbox: is the path right?"
        raise Misuse(message)
    if new is not None:
        _salvage(path, new, base_url, as_json=as_json)
    elif not _healthy(path, as_json=as_json):
        context.exit(NOT_DONE)


def _found(path: Path) -> Iterator[Finding]:
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._outbox.examine import examine

    try:
        yield from examine(path, SYSTEM_CLOCK.time_ms())
    except OSError as error:
        message = f"cannot look at {path}: {why(error)}"
        raise Misuse(message) from error


def _healthy(path: Path, *, as_json: bool) -> bool:
    from perqueue._outbox.examine import Level

    findings = []
    for finding in _found(path):
        findings.append(finding)
        if not as_json:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            click.echo(_print.printable(f"{finding.level:<8} {finding.about:<10} {finding.text}{remedy}"))
    healthy = all(finding.level is not Level.PROBLEM for finding in findings)
    if as_json:
        shown = [asdict(finding) for finding in findings]
        _print.as_json({"outbox": str(path), "healthy": healthy, "findings": shown})
    return healthy


def _salvage(path: Path, new: str, base_url: str | None, *, as_json: bool) -> None:
    from perqueue._lock import is_drained
    from perqueue._outbox.examine import users_of
    from perqueue._outbox.salvage import salvage
    from perqueue._settings import _base_url, origin_of, outbox_path

    origin = None if base_url is None else origin_of(_base_url(base_url))
    target = outbox_path(new)
    if target.exists():
        message = f"{target} exists: a salvage never overwrites anything; name a new file"
        raise Misuse(message)
    users = users_of(path)
    if users or is_drained(path):
        names = ", ".join(f"process {pid}" for pid in sorted(users) if pid) or "a process"
        message = f"{names} uses {path}: stop it first, or what it does meanwhile would be in neither file"
        raise Failure(message)
    saved = salvage(path, target, origin)
    try:
        if as_json:
            _print.as_json(asdict(saved) | {"outbox": str(target)})
        else:
            _show(saved, path, target)
    except OSError as error:
        silence_stdout()
        message = f"{target} is complete, but what is in it could not be printed: {why(error)}"
        raise Failure(message) from error


def _show(saved: Salvaged, path: Path, target: Path) -> None:
    click.echo(f"{'origin':<10} {_print.printable(saved.origin or 'none yet')}")
    for name in ("pending", "accepted", "rejected", "discarded", "damaged", "missing"):
        click.echo(f"{name:<10} {getattr(saved, name):,}")
    if saved.outcomes_only:
        click.echo(f"Of {saved.outcomes_only:,} accepted or discarded ones only the outcome could be read.")
    if saved.damaged:
        click.echo("Damaged ones are kept in the new file as they are, and never sent.")
    if saved.gaps:
        gaps = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in saved.gaps)
        click.echo(f"Nothing could be read of: {gaps}{' and more' if len(saved.gaps) >= 20 else ''}")
    if saved.missing and not saved.counted:
        click.echo("The old file's counters could not be read: some of the missing may have been delivered.")
    if saved.renumbered:
        click.echo(f"{saved.renumbered:,} of the pending ones have new numbers: theirs were in doubt.")
    click.echo(f"Now set PERQUEUE_OUTBOX (or the program's option) to {target}, and keep {path}.")
