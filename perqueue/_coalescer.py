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


class _Remembered:
    """What stands in one window; threads share it without a lock, and replace it only by an empty one."""

    __slots__ = ("ends", "ids", "refusals", "starts")

    def __init__(self, starts: int, ends: int, refusals: int) -> None:
        self.starts = starts
        self.ends = ends
        self.refusals = refusals
        """How often Per had refused something, as of the latest look: what it refused stands for no other."""
        self.ids: dict[Key, int] = {}


class Coalescer:
    """Finds the one delivery of a (billing ID, user ID, activity type) in each UTC-aligned window.

    Per reports unique users, so that the others would change no report aligned to the windows.
    """

    def __init__(self, window: timedelta, outbox: Outbox) -> None:
        self._window_ms = int(window.total_seconds() * 1000)
        self._outbox = outbox
        self._remembered = _Remembered(0, 0, 0)
        self._look_at = 0

    def standing(self, key: Key, now: int) -> int | None:
        """Return the ID of the activity that stands for a key at a time, if it is remembered here."""
        remembered = self._remembered
        if remembered.starts <= now < remembered.ends and abs(now - self._look_at) < _LOOK_INTERVAL_MS:
            return remembered.ids.get(key)
        with suppress(OutboxError):  # whoever records is told
            return self._look_around(now).ids.get(key)
        return None

    def _look_around(self, now: int) -> _Remembered:
        refusals = self._outbox.refusals()
        remembered, (starts, ends) = self._remembered, self.window(now)
        if starts != remembered.starts or ends != remembered.ends or refusals != remembered.refusals:
            self._remembered = remembered = _Remembered(starts, ends, refusals)
        self._look_at = now
        return remembered

    def window(self, now: int) -> tuple[int, int]:
        """Return beginning and end of the window that a time is in."""
        starts = now - now % self._window_ms
        return starts, starts + self._window_ms

    def record(self, key: Key, now: int) -> int:
        """Commit one activity unless another stands for it, and remember which does."""
        window = self.window(now)
        if len(self._remembered.ids) >= _MOST_KEYS:
            self.forget()
        remembered = self._remembered  # before: if Per refuses it meanwhile, it is forgotten with these
        activity_id = self._outbox.append_once(key, window, now)
        if window[0] == remembered.starts:
            remembered.ids[key] = activity_id
        return activity_id

    def forget(self) -> None:
        """Ask the outbox anew: one that Per refused stands for no other."""
        known = self._remembered
        self._remembered = _Remembered(known.starts, known.ends, known.refusals)
