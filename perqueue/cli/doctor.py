"""``perqueue doctor``: what is wrong with an outbox, and what can be saved of it."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from perqueue.cli import _print
from perqueue.cli._failure import NOT_DONE, Failure, Misuse, silence_stdout, why
from perqueue.cli._options import examples, existing, existing_file, json_option, outbox_option

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator

    from perqueue._address import DatabaseURL
    from perqueue._outbox.salvage import Salvaged

T = TypeVar("T")


@click.command(
    short_help="Look for anything wrong, and say what to do.",
    epilog=examples(
        "perqueue doctor --outbox activities.db",
        "perqueue doctor --offline --json",
        "perqueue doctor --salvage rescued.db",
    ),
)
@outbox_option
@json_option
@click.option("--offline", is_flag=True, help="Look at this machine only, and ask Per nothing.")
@click.option(
    "--ca-file",
    type=click.Path(exists=True, dir_okay=False),
    metavar="PATH",
    help="Trust these authorities (PEM) as well, as the program does with verify=….",
)
@click.option(
    "--salvage",
    "new",
    metavar="NEW_FILE",
    help="Write what can be read into a new outbox, for when the file is damaged.",
)
@click.option(
    "--base-url",
    metavar="URL",
    help="With --salvage: the new file's Per, if what the old one says is damaged. [default: what it says]",
)
@click.pass_context
def doctor(
    context: click.Context,
    outbox: str,
    ca_file: str | None,
    new: str | None,
    base_url: str | None,
    *,
    as_json: bool,
    offline: bool,
) -> None:
    """Look for anything wrong with an outbox, its machine and the way to Per, and say what to do about it.

    Reads all of the file, changes nothing, and records nothing: it sends Per at most five requests, within
    ten seconds, and none that could count anybody. Tokens come from the environment. With --offline it sends
    none: use that in cron. Exit code 0: nothing is wrong. 1: something is. 2: it cannot look, because
    there is no such file, or this user may not read it.

    With --salvage every activity that can still be read goes into a new file, with its outcome: what was
    pending, or whose outcome cannot be read, is pending there. The old file is only read: keep it. First stop
    the programs that use it. If there is nothing of an outbox to be read, there is no new file.
    """
    if base_url is not None and new is None:
        raise click.UsageError("--base-url is for --salvage.")
    if ca_file is not None and (offline or new is not None):
        raise click.UsageError("--ca-file is for asking Per: leave out --offline and --salvage.")
    try:
        place = existing(outbox) if new is None else existing_file(outbox)
    except OSError as error:  # a folder that is closed to this user
        message = f"cannot look at {outbox}: {why(error)}"
        raise Misuse(message) from error
    if isinstance(place, Path) and not place.is_file():
        message = f"{place} is not a regular file, and so no outbox: is the path right?"
        raise Misuse(message)
    if new is not None and isinstance(place, Path):
        _salvage(place, new, base_url, as_json=as_json)
        return
    context_of_tls = None if offline else _trusting(ca_file)
    if not _healthy(place, context_of_tls, as_json=as_json):
        context.exit(NOT_DONE)


def _trusting(ca_file: str | None) -> ssl.SSLContext:
    import ssl

    from perqueue._wire.tls import tls_context

    context = tls_context(verify=True)
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except (ssl.SSLError, OSError) as error:
            message = f"--ca-file {ca_file}: no certificates in PEM can be read there"
            raise Misuse(message) from error
    return context


def _healthy(place: Path | DatabaseURL, context: ssl.SSLContext | None, *, as_json: bool) -> bool:
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue.cli._checks.paper import Paper
    from perqueue.cli._checks.visit import visit

    paper = Paper(place, silent=as_json)
    for title, findings in _found(place, visit(place, os.environ, SYSTEM_CLOCK.time_ms(), context)):
        paper.begin(title)
        for finding in _found(place, findings):
            paper.write(finding)
    if as_json:
        _print.as_json({"outbox": str(place), "healthy": paper.healthy, "findings": paper.findings})
    else:
        paper.end()
    return paper.healthy


def _found(place: Path | DatabaseURL, findings: Iterator[T]) -> Iterator[T]:
    try:
        yield from findings
    except OSError as error:
        message = f"cannot look at {place}: {why(error)}"
        raise Misuse(message) from error


def _salvage(path: Path, new: str, base_url: str | None, *, as_json: bool) -> None:
    from perqueue._lock import is_drained
    from perqueue._outbox.examine import users_of
    from perqueue._outbox.salvage import salvage
    from perqueue._settings import checked_base_url, origin_of, outbox_path
    from perqueue.cli._checks.programs import names_of

    origin = None if base_url is None else origin_of(checked_base_url(base_url))
    target = outbox_path(new)
    if target.exists():
        message = f"{target} exists: a salvage never overwrites anything; name a new file"
        raise Misuse(message)
    users = users_of(path)
    if users or is_drained(path):
        who = names_of(users) or "a process"
        message = f"{who} uses {path}: stop it first, or what it does meanwhile would be in neither file"
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
