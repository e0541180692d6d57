"""``perqueue status --watch``: the same look again and again, in a terminal or as lines."""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import click

from perqueue._clock import moment_from_ms
from perqueue._outbox import open_to_look
from perqueue.cli import _print
from perqueue.cli._options import is_missing, missing
from perqueue.cli._sight import fields, see
from perqueue.cli._signals import stop_requests
from perqueue.cli._track import Track
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue._outbox.look import Look
    from perqueue.cli._track import Percentiles, Picture


class View(Protocol):
    """Shows one picture after the other."""

    def __call__(self, picture: Picture) -> None: ...


class _Patient:
    """Looks at an outbox whose file may not be there yet."""

    def __init__(self, place: Path | DatabaseURL) -> None:
        self._place = place
        self._onlooker = None if is_missing(place) else open_to_look(place)

    def look(self) -> Look:
        if self._onlooker is None:
            if is_missing(self._place):
                raise OutboxError(missing(self._place))
            self._onlooker = open_to_look(self._place)
        return self._onlooker.look()


def watch(place: Path | DatabaseURL, interval: float, *, as_json: bool) -> None:
    """Look every so many seconds until SIGTERM or SIGINT; raise :class:`OutboxError` of what is no outbox."""
    onlooker, track = _Patient(place), Track()
    with stop_requests() as stop, _view(interval, as_json=as_json) as show:
        due = time.monotonic()
        while True:
            show(track.add(see(onlooker, place), time.monotonic()))
            due = max(due + interval, time.monotonic())  # what was missed is not made up for
            if stop.wait(max(0.0, due - time.monotonic())):
                return


@contextmanager
def _view(interval: float, *, as_json: bool) -> Iterator[View]:
    if as_json or not _print.to_terminal() or (sys.stdout.encoding or "").lower().replace("-", "") != "utf8":
        yield _json_line if as_json else _line
        return
    try:
        from perqueue.cli._screen import Screen
    except ImportError as error:
        click.echo(f"plain lines, because {error.name} is missing: install useper-perqueue[watch]", err=True)
        yield _line
        return
    last: Picture | None = None
    with Screen(interval) as screen:

        def show(picture: Picture) -> None:
            nonlocal last
            last = picture
            screen.show(picture)

        yield show
    if last is not None:
        _line(last)  # the screen is gone, and what it said last is worth keeping


def _line(picture: Picture) -> None:
    look, rates = picture.sight.look, picture.rates
    said = picture.health.line()
    if look is not None:
        position = look.position
        counts = f"pending {position.pending:,}"
        if rates is not None:
            counts += f" ({_print.signed(rates.pending)}/s)"
        if picture.sight.oldest_age is not None:
            counts += f", oldest {_print.age(picture.sight.oldest_age)}"
        counts += f", delivered {position.accepted:,}"
        if rates is not None:
            counts += f" ({_print.rate(rates.delivered)}/s)"
        said = f"{counts}; {said}"
    click.echo(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {said}")


def _json_line(picture: Picture) -> None:
    sight, rates = picture.sight, picture.rates
    shown: dict[str, Any] = {"at": moment_from_ms(sight.now), "outbox": str(sight.path)}
    if sight.look is not None:
        shown |= fields(sight)
    shown |= {
        "mood": picture.health.mood,
        "says": picture.health.text,
        "remedy": picture.health.remedy,
        "pending_per_second": None if rates is None else round(rates.pending, 3),
        "recorded_per_second": None if rates is None else round(rates.recorded, 3),
        "delivered_per_second": None if rates is None else round(rates.delivered, 3),
        "answers": _as_dict(picture.answers),
        "failures": _as_dict(picture.failures),
        "errors": [
            {"reason": each.reason, "count": each.times, "last_at": moment_from_ms(each.last_at)}
            for each in picture.errors
        ],
    }
    click.echo(json.dumps(shown, default=str))


def _as_dict(took: Percentiles | None) -> dict[str, int] | None:
    if took is None:
        return None
    return {"count": took.requests, "p50_ms": took.p50, "p95_ms": took.p95, "p99_ms": took.p99}
