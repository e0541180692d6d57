"""Passing on what the drain did: to whoever waits, and to the user's callbacks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from perqueue._activity import State
from perqueue._receipt import Waiters

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._activity import Activity
    from perqueue._coalescer import Coalescer
    from perqueue._outbox import Hold, Settled
    from perqueue._settings import Settings
    from perqueue._stats import Stats

log = logging.getLogger("perqueue")


class Observer:
    """What the drain's thread calls. Holds no reference to the queue, which may be dropped.

    ``stats`` returns None once it is.
    """

    def __init__(
        self, settings: Settings, stats: Callable[[], Stats | None], coalescer: Coalescer | None = None
    ) -> None:
        self.waiters = Waiters()
        self._coalescer = coalescer
        self._settings = settings
        self._stats = stats
        self._stalled = False

    def on_settled(self, outcomes: dict[int, Settled], rejected: list[Activity]) -> None:
        """These activities are no longer pending."""
        if self._coalescer is not None and any(o.state is not State.ACCEPTED for o in outcomes.values()):
            self._coalescer.forget()
        self.waiters.settled(outcomes)
        callback = self._settings.on_rejected
        if callback is not None:
            for activity in rejected:
                call_back(callback, activity)

    def on_hold(self, hold: Hold) -> None:
        """Nothing is sent for now."""
        self.waiters.tell_all(hold)

    def on_tick(self) -> None:
        """Look whether delivery has stalled; called every second or two."""
        callback = self._settings.on_stalled
        stats = self._stats() if callback is not None else None
        if callback is None or stats is None:
            return
        stalled = (stats.oldest_pending_age or 0.0) > self._settings.stalled_after
        if stalled and not self._stalled:
            call_back(callback, stats)
        self._stalled = stalled

    def awaited(self) -> list[int] | None:
        """Return the activities that somebody waits for; None if nobody waits for anything."""
        return self.waiters.ids() if self.waiters.any() else None


def call_back(callback: Callable[[Any], object], argument: object) -> None:
    """Call back a user's function; its mistakes are its own."""
    try:
        callback(argument)
    except BaseException:  # a SystemExit would end the drain, too
        log.exception("a perqueue callback has failed")
