"""What the tables tell about delivery: what Per refused, what is pending and why, and the trail's reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from perqueue._outbox.file_trail import is_as_recorded
from perqueue._outbox.finding import moment, ok, problem, warning
from perqueue._words import counted

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator, Sequence

    from perqueue._outbox.finding import Finding

_OLD = 5 * 60_000
_LIVELY = 60_000
"""Milliseconds without an answer of Per's after which delivery has come to a halt."""
_REASONS = 3
_PAUSES = {
    "bad_token": "give the program that delivers a token that Per knows, and restart it",
    "refused": "as a rule the activity type is wrong: correct it in the program and restart that",
}


@dataclass(slots=True, kw_only=True)
class Known:
    """What was learned from the file while it was examined."""

    legible: bool = False
    """Whether its origin could be read."""
    origin: str | None = None
    pending: int = 0
    asked_to_wait_until: int | None = None
    """Per's own ``Retry-After``, in milliseconds since the epoch."""


class Backlog(NamedTuple):
    """What is pending, and why. Times are in milliseconds since the epoch."""

    pending: int
    oldest: int | None
    """When that was recorded."""
    hold: tuple[str, str, int, int] | None
    """Kind, reason, end and length (milliseconds) of what holds up delivery."""
    answered: int | None
    """When Per's latest answer came, as far as it is stored."""


def refusals(reader: sqlite3.Connection) -> Iterator[Finding]:
    """Say what Per refused, and why."""
    rows = reader.execute(
        "SELECT reason, count(*) FROM perqueue_settlement WHERE rejection IS NOT NULL"
        " GROUP BY reason ORDER BY count(*) DESC, reason"
    ).fetchall()
    yield from refused(rows)


def refused(rows: Sequence[tuple[object, int]]) -> Iterator[Finding]:
    """Say what Per refused: reasons, and how many for each, the commonest first."""
    if rows:
        text = f"Per refused {counted(sum(count for _, count in rows), 'activity')}: "
        text += ", ".join(f"{count:,} for {_quoted(reason)}" for reason, count in rows[:_REASONS])
        text += f" and {counted(len(rows) - _REASONS, 'more reason')}" if len(rows) > _REASONS else ""
        yield warning("rejected", text, "`perqueue rejected list`, then requeue or discard them")


def _quoted(reason: object) -> str:
    return f"{str(reason)[:60]!r}"


def delivery(
    reader: sqlite3.Connection, now: int, known: Known, *, drained: bool | None
) -> Iterator[Finding]:
    """Say whether what is pending is on its way, and if not, why."""
    hold = reader.execute("SELECT hold, hold_reason, hold_until, hold_wait_ms FROM perqueue_drain").fetchone()
    count, oldest = reader.execute(
        "SELECT count(*), min(a.recorded_at) FROM perqueue_activity a"
        " WHERE NOT EXISTS (SELECT 1 FROM perqueue_settlement s WHERE s.activity_id = a.id)"
    ).fetchone()
    (answered,) = reader.execute(
        "SELECT max(settled_at) FROM (SELECT settled_at FROM perqueue_settlement"
        " ORDER BY activity_id DESC LIMIT 300)"
    ).fetchone()
    waiting = Backlog(count, oldest, None if hold[0] is None else hold, answered)
    yield from judge(waiting, now, known, drained=drained)


def judge(waiting: Backlog, now: int, known: Known, *, drained: bool | None) -> Iterator[Finding]:
    """Say whether what is pending is on its way, and if not, why."""
    known.pending = waiting.pending
    if not waiting.pending or waiting.oldest is None:
        yield ok("delivery", "nothing is pending")
        return
    backlog = f"{waiting.pending:,} pending, the oldest since {moment(waiting.oldest)}"
    kind, reason, until, wait_ms = waiting.hold or (None, "", now, 0)
    until = min(until, now + wait_ms)  # the clock may have been set back
    if kind == "retry_after" and until > now:
        known.asked_to_wait_until = until
    if kind in _PAUSES:
        text = f"{backlog}; delivery is paused ({kind.replace('_', ' ')}: {reason})"
        yield problem("delivery", text, _PAUSES[kind])
    elif drained is False:
        yield _unattended(backlog, waiting.oldest, now)
    elif kind is not None:
        text = f"{backlog}; next try at {moment(until)} ({kind.replace('_', ' ')}: {reason})"
        yield warning("delivery", text, "it goes on by itself when Per answers")
    else:
        yield _attended(backlog, waiting.oldest, waiting.answered, now)


def _unattended(backlog: str, oldest: int, now: int) -> Finding:
    text = f"{backlog}; nobody delivers"
    remedy = "see that a program with this outbox runs, or `perqueue drain`"
    return (problem if now - oldest > _OLD else warning)("delivery", text, remedy)


def _attended(backlog: str, oldest: int, answered: int | None, now: int) -> Finding:
    latest = "none of Per's answers is stored yet"
    if answered is not None:
        latest = f"Per's latest answer is of {moment(answered)}"
    if now - oldest <= _OLD:
        return ok("delivery", f"{backlog}; {latest}")
    if answered is not None and now - answered <= _LIVELY:
        remedy = "`perqueue status --watch` shows whether it keeps up"
        return warning("delivery", f"{backlog}; it is being delivered: {latest}", remedy)
    remedy = "look at the log of the program that delivers; if it hangs, restart it"
    return problem("delivery", f"{backlog}, and nothing moves: {latest}", remedy)


def times(reader: sqlite3.Connection, now: int) -> Iterator[Finding]:
    """Say what is odd about dates, and how far back the audit trail goes."""
    rows = reader.execute(
        "SELECT billing_id, user_id, activity_type_id, recorded_at, checksum FROM perqueue_activity"
        " ORDER BY id DESC LIMIT 1000"
    ).fetchall()
    newest = max((row[3] for row in rows if is_as_recorded(row)), default=None)
    if newest is not None and newest > now + 60_000:
        text = f"an activity is dated {moment(newest)}, and now is {moment(now)}"
        yield problem("dates", text, "set the clock: ages and waits are wrong, nothing else")
    names = [str(column[1]) for column in reader.execute("PRAGMA table_info(perqueue_drain)")]
    if "trail_lost_through" not in names:
        return  # an older schema did not store it
    (lost,) = reader.execute("SELECT trail_lost_through FROM perqueue_drain").fetchone()
    if lost:
        yield trail(lost)


def trail(lost: int) -> Finding:
    """Say up to when settled activities were deleted."""
    text = f"settled activities up to {moment(lost)} were deleted: `perqueue reconcile` calls no period"
    return ok("trail", f"{text} that reaches back further a match (a longer keep_delivered does)")
