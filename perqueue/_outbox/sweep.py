"""Where to look for what is old enough to be pruned, a little at a time."""

from __future__ import annotations

_RECENT_SKIPPED = 2000
"""Settled activities in a row, too young to be pruned, after which a sweep goes elsewhere, then ends."""


class Sweep:
    """Goes through settled activities by their numbers.

    The oldest come first. But some of the first may have been delivered late, and say nothing about those
    behind them: each sweep also goes on for a while where the one before it ended.
    """

    def __init__(self) -> None:
        self.through = 0
        """Where it is: the next look is for higher numbers."""
        self._explored_through = 0
        self._exploring = False
        self._recent = 0

    def begin_anew(self) -> None:
        """Look at the oldest next."""
        self.through = 0

    def looked(self, at: int, *, through: int | None, found: bool, recent: bool) -> bool:
        """Decide where to look next, and tell whether that is still this sweep.

        It has looked ``at`` so many rows, ``through`` a number (None: the end of the table), has ``found``
        some to delete, and has seen some that are too ``recent``.
        """
        self._recent = 0 if found else self._recent + at * recent
        if through is not None and self._recent < _RECENT_SKIPPED:
            self.through = through
            return True
        self._recent = 0
        if through is None:
            self._explored_through = 0
        elif not self._exploring:
            self._exploring = True
            self.through = max(through, self._explored_through)
            return True
        else:
            self._explored_through = through
        self._exploring = False
        self.through = 0
        return False
