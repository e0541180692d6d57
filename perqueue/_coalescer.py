"""Which activities already stand for their key in the current window: a memory before the outbox's own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from datetime import timedelta

    from perqueue._outbox import Key, Outbox

_MOST_KEYS = 100_000
_LOOK_INTERVAL_MS = 100
"""How often, at most, it is looked whether another process had an activity refused."""


class Coalescer:
    """Finds the one delivery of a (billing ID, user ID, activity type) in each UTC-aligned window.

    Per reports unique users, so that the others would change no report aligned to the windows.
    """

    def __init__(self, window: timedelta, outbox: Outbox) -> None:
        self._window_ms = int(window.total_seconds() * 1000)
        self._outbox = outbox
        self._standing: dict[Key, int] = {}
        self._ends = self._starts = 0
        self._look_at = 0
        self._refusals = 0

    def standing(self, key: Key, now: int) -> int | None:
        """Return the ID of the activity that stands for a key at a time, if it is remembered here."""
        if self._starts <= now < self._ends and abs(now - self._look_at) < _LOOK_INTERVAL_MS:
            return self._standing.get(key)
        with suppress(OutboxError):  # whoever records is told
            self._look_around(now)
            return self._standing.get(key)
        return None

    def _look_around(self, now: int) -> None:
        refusals = self._outbox.refusals()
        starts = now - now % self._window_ms
        if starts != self._starts or refusals != self._refusals:
            self.forget()
        self._starts, self._ends = starts, starts + self._window_ms
        self._refusals = refusals
        self._look_at = now

    def window(self, now: int) -> tuple[int, int]:
        """Return beginning and end of the window that a time is in."""
        starts = now - now % self._window_ms
        return starts, starts + self._window_ms

    def record(self, key: Key, now: int) -> int:
        """Commit one activity unless another stands for it, and remember which does."""
        starts, _ = window = self.window(now)
        activity_id = self._outbox.append_once(key, window, now)
        if starts == self._starts:
            if len(self._standing) >= _MOST_KEYS:
                self.forget()
            self._standing[key] = activity_id
        return activity_id

    def forget(self) -> None:
        """Ask the outbox anew: one that Per refused stands for no other."""
        self._standing = {}
