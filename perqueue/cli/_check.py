"""``perqueue status --check``: one line and an exit code, for a probe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

import click

from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._failure import why
from perqueue.cli._health import PAUSES, Health, Mood, judge
from perqueue.cli._options import is_missing
from perqueue.cli._sight import Sight, fields, see
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from pathlib import Path

    from perqueue._address import DatabaseURL


class Verdict(NamedTuple):
    """What a probe gets to know."""

    healthy: bool
    why: str
    """One line, with the remedy."""


class Limits(NamedTuple):
    """What is still healthy."""

    age: float
    """Seconds."""
    pending: int | None
    damaged: int = 0
    """How many damaged or missing ones somebody knows of."""


def check(path: Path | DatabaseURL, limits: Limits) -> tuple[Verdict, Sight | None]:
    """Look once, and say whether all is well; a file that cannot be looked at is not."""
    from perqueue._outbox import open_to_look

    try:
        # And is not created: a probe of a wrong path must not make it right.
        if is_missing(path):
            return Verdict(healthy=False, why=f"there is no outbox at {path} -> is the path right?"), None
        sight = see(open_to_look(path), path)
    except OutboxError as error:
        return Verdict(healthy=False, why=str(error)), None
    except OSError as error:
        return Verdict(healthy=False, why=f"{path}: {why(error)}"), None
    return _verdict(sight, limits), sight


def _verdict(sight: Sight, limits: Limits) -> Verdict:
    look, health = sight.look, judge(sight)
    if look is None or sight.is_full:
        return Verdict(healthy=False, why=health.line())
    position = look.position
    if position.damaged > limits.damaged:
        text = f"{counted(position.damaged, 'damaged or missing activity')} not delivered"
        text += f" (--max-damaged {limits.damaged:,})" if limits.damaged else ""
        remedy = "`perqueue doctor` says what can be rescued; --max-damaged is for those that cannot"
        return Verdict(healthy=False, why=Health(mood=Mood.TROUBLE, text=text, remedy=remedy).line())
    if not position.pending:
        return Verdict(healthy=True, why=health.text)
    age = sight.oldest_age or 0.0
    backlog = f"{position.pending:,} pending, the oldest for {_print.age(age)}"
    if age > limits.age:
        backlog += f" (--max-age {_print.age(limits.age)})"
    elif limits.pending is not None and position.pending > limits.pending:
        backlog += f" (--max-pending {limits.pending:,})"
    elif position.hold is None or position.hold.kind not in PAUSES:
        return Verdict(healthy=True, why=f"{backlog}; {health.text}")
    remedy = health.remedy or "`perqueue status --watch` shows whether delivery keeps up"
    named = Health(mood=health.mood, text=f"{backlog}; {health.text}", remedy=remedy)
    return Verdict(healthy=False, why=named.line())


def tell(verdict: Verdict, sight: Sight | None, path: Path | DatabaseURL, *, as_json: bool) -> None:
    """Print the one line."""
    if not as_json:
        state = "healthy" if verdict.healthy else "unhealthy"
        click.echo(f"{state}: {_print.printable(' '.join(verdict.why.split()))}")
        return
    shown: dict[str, object] = {"healthy": verdict.healthy, "why": verdict.why, "outbox": str(path)}
    if sight is not None and sight.look is not None:
        shown |= fields(sight)
    click.echo(json.dumps(shown, default=str))
