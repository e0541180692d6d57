"""Passing on what the drain did: to whoever waits, and to the user's callbacks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from perqueue._activity import State
from perqueue._complaints import where
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
        self._failed: set[tuple[str, type[BaseException]]] = set()

    def on_settled(self, outcomes: dict[int, Settled], rejected: list[Activity]) -> None:
        """These activities are no longer pending."""
        if self._coalescer is not None and any(o.state is not State.ACCEPTED for o in outcomes.values()):
            self._coalescer.forget()
        self.waiters.settled(outcomes)
        if self._settings.on_rejected is not None:
            for activity in rejected:
                self.call_back("on_rejected", activity)

    def on_hold(self, hold: Hold) -> None:
        """Nothing is sent for now."""
        self.waiters.tell_all(hold)

    def on_tick(self) -> None:
        """Look whether delivery has stalled; called every second or two."""
        stats = None if self._settings.on_stalled is None else self._stats()
        if stats is None:
            return
        stalled = (stats.oldest_pending_age or 0.0) > self._settings.stalled_after
        if stalled and not self._stalled:
            self.call_back("on_stalled", stats)
        self._stalled = stalled

    def awaited(self) -> list[int] | None:
        """Return the activities that somebody waits for; None if nobody waits for anything."""
        return self.waiters.ids() if self.waiters.any() else None

    def call_back(self, name: str, argument: object) -> None:
        """Call back a user's function by its option's name; its mistakes are its own, and logged once."""
        try:
            getattr(self._settings, name)(argument)
        except BaseException as error:
            log.debug("%s has failed", name, exc_info=True)
            told = (name, type(error))
            if told not in self._failed:
                self._failed.add(told)
                log.error(
                    "a perqueue callback has failed, which is logged once: %s raised %s", name, where(error)
                )
