"""Being told to stop, as something to wait for instead of an exception in the middle of anything."""

from __future__ import annotations

import os
import select
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class StopRequest:
    """Whether SIGTERM or SIGINT has come."""

    def __init__(self, reader: int) -> None:
        self._reader = reader

    def wait(self, seconds: float) -> bool:
        """Wait for the request, at most so long, and tell whether it has come."""
        return bool(select.select([self._reader], [], [], seconds)[0])


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Take the first SIGTERM or SIGINT as a request; a second one ends the program as usual."""
    reader, writer = os.pipe()
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    def stop(_number: int, _frame: object) -> None:
        restore()
        os.write(writer, b"!")  # all that a handler may safely do, wherever it interrupts

    for number in former:
        signal.signal(number, stop)
    try:
        yield StopRequest(reader)
    finally:
        restore()
        os.close(reader)
        os.close(writer)
