"""What is wrong and was logged: each trouble is told once, and so is its end."""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("perqueue")


class Complaints:
    """Logs a trouble once, however often it is met, until it is over."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._since: dict[str, float] = {}

    def tell(self, about: str, level: int, message: str) -> None:
        """Log it, unless it was and is not over."""
        if about not in self._since:
            self._since[about] = self._monotonic()
            log.log(level, "%s", message)

    def over(self, *about: str) -> str | None:
        """Forget these; return for how long there was one of them, in words, if it was told."""
        if not self._since:  # as a rule, and asked in every turn of the drain
            return None
        since = min((self._since.pop(each) for each in about if each in self._since), default=None)
        return None if since is None else _span(self._monotonic() - since)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def where(error: BaseException) -> str:
    """Return what kind of error it is and where it came from, without its text, which may hold an ID."""
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    return f"{type(error).__name__}, raised here:\n{frames}"
