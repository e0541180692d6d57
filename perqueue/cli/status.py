"""``perqueue status``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from perqueue.cli import _print
from perqueue.cli._options import examples, json_option, open_as_operator, outbox_option

if TYPE_CHECKING:
    from datetime import datetime

    from perqueue._outbox import Position


@click.command(
    epilog=examples("perqueue status --outbox activities.db", "perqueue status --json | jq .pending")
)
@outbox_option
@json_option
def status(outbox: str, *, as_json: bool) -> None:
    """Show what an outbox holds, whether it is being delivered, and if not, why.

    Needs no token, asks nobody but the file, and costs the same however much is in it. While something is
    pending in the last 24 hours of a month (UTC), it warns: Per counts by arrival, so what is late counts in
    the next month (`month_end` in --json).
    """
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._lock import is_drained
    from perqueue._settings import outbox_path
    from perqueue._status import crossing

    opened = open_as_operator(outbox)
    try:
        position = opened.position()
        with opened._reading() as connection:  # noqa: SLF001 - the file's own page about itself
            (origin,) = connection.execute("SELECT origin FROM perqueue_outbox").fetchone()
    finally:
        opened.close()
    path = outbox_path(outbox)
    shown = snapshot(position, drained=is_drained(path))
    shown |= {"discarded": position.discarded, "origin": origin, "outbox": str(path)}
    now = SYSTEM_CLOCK.time_ms()
    shown["month_end"] = crossing(position.pending, now)
    if as_json:
        _print.as_json(shown)
    else:
        _show(shown, now)


def snapshot(position: Position, *, drained: bool | None) -> dict[str, Any]:
    """Return the fields of :class:`perqueue.Stats` as another process can know them, and who drains."""
    from perqueue._clock import SYSTEM_CLOCK
    from perqueue._status import describe

    stats = describe(position, None, drains=drained is not False, now=SYSTEM_CLOCK.time_ms())
    return asdict(stats) | {"drained": drained, "drainer_pid": position.drainer_pid if drained else None}


def _show(shown: dict[str, Any], now: int) -> None:
    pending, oldest = f"{shown['pending']:,}", shown["oldest_pending_age"]
    if oldest is not None:
        pending += f", the oldest for {_print.age(oldest)}"
    rejected = f"{shown['rejected']:,}" + ("  (perqueue rejected list)" if shown["rejected"] else "")
    lines = {
        "outbox": shown["outbox"],
        "origin": shown["origin"] or "none yet",
        "state": _state(shown),
        "drainer": _drainer(shown),
        "pending": pending,
        "delivered": f"{shown['delivered']:,}",
        "rejected": rejected,
        "discarded": f"{shown['discarded']:,}",
        "damaged": f"{shown['damaged']:,}" + ("  (perqueue doctor)" if shown["damaged"] else ""),
    }
    if shown["month_end"] is not None:
        lines["warning"] = _warning(shown["month_end"], shown["pending"], now)
    for name, value in lines.items():
        click.echo(f"{name:<10} {_print.printable(value)}")


def _warning(end: datetime, pending: int, now: int) -> str:
    left = _print.age(end.timestamp() - now / 1000)
    return (
        f"{pending:,} pending, and the month ends in {left}: what Per has not got by then counts in {end:%B}"
    )


def _state(shown: dict[str, Any]) -> str:
    text = str(shown["state"]).replace("_", " ")
    if shown["reason"]:
        text += f": {shown['reason']}"
    resumes = shown["resumes_at"]
    if resumes is not None and shown["drained"]:
        wait = resumes.timestamp() - time.time()
        text += f"; next try in {_print.age(wait)}" if wait >= 1 else "; next try now"
    return text


def _drainer(shown: dict[str, Any]) -> str:
    if shown["drained"] is None:
        return "unknown: this user may not look at the drain lock"
    if shown["drained"]:
        return (
            f"process {shown['drainer_pid']}"
            if shown["drainer_pid"]
            else "a process that is starting or ending"
        )
    if str(shown["state"]) == "paused":
        return "none while paused"
    return "none" + ("  (perqueue drain delivers)" if shown["pending"] else "")
