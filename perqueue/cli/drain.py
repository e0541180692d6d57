"""``perqueue drain``."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._failure import Failure
from perqueue.cli._flush import Stopped, watched_flush
from perqueue.cli._options import Seconds, examples, existing, is_embedded, need_token, outbox_option
from perqueue.cli._signals import StopRequest, stop_requests
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from perqueue._outbox import Position
    from perqueue._recorder import PerQueue
    from perqueue._stats import Stats

_PATIENCE = 30.0
_LOOK = 0.5


@click.command(
    epilog=examples(
        "perqueue drain",
        'perqueue drain --timeout 60 || echo "not everything has arrived"',
        "perqueue drain --watch",
    )
)
@outbox_option
@click.option("--watch", is_flag=True, help="Go on until SIGTERM or SIGINT.")
@click.option(
    "--timeout",
    type=Seconds(0),
    metavar="SECONDS",
    help="Give up after this time. [default: after 30 s in which nothing was delivered]",
)
def drain(outbox: str, timeout: float | None, *, watch: bool) -> None:
    """Deliver what is in the outbox, and say whether Per has it all.

    Exit code 0: everything that was pending is accepted. 1: something was refused, or is still pending;
    it is kept, and stderr says why. Needs PER_ACTIVITY_TOKEN. If another process delivers this outbox
    already, this waits for it.

    With --watch it stays and delivers whatever is recorded. SIGTERM or SIGINT ends it with exit code 0
    after the requests in flight are answered and settled; a second one ends it at once.
    """
    if watch and timeout is not None:
        raise click.UsageError("--watch has no end, so --timeout has no meaning with it.")
    need_token("PER_ACTIVITY_TOKEN", "activity")
    if not watch:
        existing(outbox)  # a cron job with a mistyped path must not succeed every time

    from perqueue._recorder import PerQueue

    with stop_requests() as stop:
        queue = PerQueue(outbox, drain=True, embedded=is_embedded(outbox))
        try:
            if watch:
                _watch(queue, stop)
            else:
                _drain(queue, stop, timeout)
        finally:
            # Each request has its own deadline, so all that are in flight get answered or fail in time.
            queue._close(queue._settings.request_timeout)  # noqa: SLF001


def _drain(queue: PerQueue, stop: StopRequest, timeout: float | None) -> None:
    before, began = queue._opened_at, time.monotonic()  # noqa: SLF001 - delivery has begun since
    try:
        with _progress(before) as look:
            watched_flush(queue, timeout=timeout, patience=_PATIENCE, look=look, pause=stop.wait)
    except Stopped:
        message = f"stopped: {counted(queue.stats().pending, 'activity')} pending, and kept"
        raise Failure(message) from None
    finally:
        after, took = queue.stats(), time.monotonic() - began
        delivered = after.delivered - before.accepted
        click.echo(
            f"delivered {delivered:,} in {took:.1f} s, {after.pending:,} pending, {after.rejected:,} rejected"
        )


@contextmanager
def _progress(before: Position) -> Iterator[Callable[[Stats], None]]:
    if not (before.pending and _print.to_terminal()):
        yield lambda _: None
        return
    shown = 0
    with click.progressbar(length=before.pending, label="delivering", show_pos=True) as bar:

        def look(stats: Stats) -> None:
            nonlocal shown
            done = sum((stats.delivered, stats.rejected, stats.damaged))
            done -= sum((before.accepted, before.rejected, before.damaged))
            done = max(shown, min(done, before.pending))
            bar.label = str(stats.state).replace("_", " ")
            bar.update(done - shown)
            shown = done

        yield look


def _watch(queue: PerQueue, stop: StopRequest) -> None:
    queue._follower().start()  # noqa: SLF001 - others record: this process may never call record()
    _say(f"watching {queue._settings.outbox} for {queue._settings.origin}")  # noqa: SLF001
    said = None
    while not stop.wait(_LOOK):
        worker = queue._worker  # noqa: SLF001
        thread = worker.thread if worker else None
        if thread is None or not thread.is_alive():
            raise Failure("the delivering thread has ended: start this again, and please report it")
        news = _news(queue)
        if news != said:
            _say(news or "delivering")
            said = news
    _say("stopping: requests in flight are waited for")


def _news(queue: PerQueue) -> str | None:
    """Return what is wrong. Idle and delivering alternate all the time: only trouble and its end are news."""
    try:
        stats = queue.stats()
    except OutboxError as error:
        return str(error)  # the drain tries again, and so does this
    return f"{str(stats.state).replace('_', ' ')}: {stats.reason}" if stats.reason else None


def _say(text: str) -> None:
    click.echo(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {_print.printable(text)}", err=True)
