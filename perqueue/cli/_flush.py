"""A flush that can be watched, and given up while nothing moves."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from perqueue._words import counted
from perqueue.exceptions import FlushTimeout, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._recorder import PerQueue
    from perqueue._stats import Stats

LOOK = 0.1
"""Seconds between two looks."""


class Stopped(Exception):
    """The wait was ended from outside."""


def watched_flush(
    queue: PerQueue,
    *,
    timeout: float | None,
    patience: float,
    look: Callable[[Stats], None],
    pause: Callable[[float], bool],
) -> None:
    """Flush, showing how it stands; raise what the flush raises.

    Without a ``timeout`` it goes on for as long as something gets settled, and raises
    :class:`~perqueue.FlushTimeout` after ``patience`` seconds in which nothing did. ``pause`` waits that
    many seconds and returns whether to stop; that raises :class:`Stopped`.
    """
    result: list[PerQueueError | None] = []

    def run() -> None:
        try:
            queue.flush(timeout)
            result.append(None)
        except PerQueueError as error:
            result.append(error)

    thread = threading.Thread(target=run, name="perqueue-flush", daemon=True)
    thread.start()
    settled, moved_at = -1, time.monotonic()
    while thread.is_alive():
        if pause(LOOK):
            raise Stopped
        stats = queue.stats()
        look(stats)
        now_settled = stats.delivered + stats.rejected + stats.damaged
        now = time.monotonic()
        if now_settled != settled:
            settled, moved_at = now_settled, now
        elif timeout is None and now - moved_at > patience:
            why = queue._why_pending()  # noqa: SLF001 - the words that a flush with a timeout would use
            kept = counted(stats.pending, "activity")
            message = f"nothing was accepted for {patience:g} s, {kept} kept ({why})"
            raise FlushTimeout(message, pending=stats.pending, reason=why)
    error = result[0] if result else RuntimeError("the flush has failed")
    if error is not None:
        raise error
