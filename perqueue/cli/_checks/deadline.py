"""A true deadline for what may hang: a name server, a firewall, a server that drips."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Deadline:
    """When everything that goes over the network must have ended."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Return the seconds that are left for a step of ``most`` seconds."""
        return max(0.001, min(most, self._end - time.monotonic()))

    def run(self, step: Callable[[], T], most: float) -> T:
        """Return what a step returns, or raise what it raises; :class:`TimeoutError` if it takes too long.

        It runs on a thread of its own, which is left to itself then: a name look-up cannot be ended.
        """
        answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((step(), None))
            except Exception as error:  # noqa: BLE001 - carried to whoever waits
                answers.put((None, error))

        threading.Thread(target=run, name="perqueue-doctor", daemon=True).start()
        try:
            result, error = answers.get(timeout=self.left(most))
        except queue.Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # without an error it is what the step returned
