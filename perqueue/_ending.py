"""The ends that nobody announces: a queue that is dropped, and an interpreter that exits."""

from __future__ import annotations

import atexit
import logging
import time
import weakref
from typing import TYPE_CHECKING, Protocol

from perqueue import _threads

if TYPE_CHECKING:
    from perqueue._client import Reporter
    from perqueue._delivery.worker import Worker
    from perqueue._outbox import Outbox

log = logging.getLogger("perqueue")


class Ending(Protocol):
    """A queue, as far as its end at interpreter exit goes."""

    def deliver_at_exit(self, began: float) -> None:
        """Deliver what can be delivered in time, then close; in silence."""


_open: weakref.WeakSet[Ending] = weakref.WeakSet()


def opened(queue: Ending) -> None:
    """Have the queue deliver when the interpreter exits."""
    _open.add(queue)


def closed(queue: Ending) -> None:
    """Leave the queue alone when the interpreter exits."""
    _open.discard(queue)


@atexit.register
def _at_exit() -> None:
    began = time.monotonic()
    for queue in list(_open):
        queue.deliver_at_exit(began)


def end(outbox: Outbox, worker: Worker | None, reporter: Reporter, grace: float) -> None:
    """Stop the threads and close what is open; requests in flight have ``grace`` seconds."""
    if worker is not None:
        worker.stop(grace)
    outbox.close()
    reporter.close()


def end_elsewhere(outbox: Outbox, worker: Worker | None, reporter: Reporter, grace: float = 0.0) -> None:
    """Do as :func:`end`, on a thread of its own.

    For callers that must not wait: the garbage collector, which may run anywhere and under any lock, and
    the drain's own thread.
    """
    try:
        arguments = (outbox, worker, reporter, grace)
        _threads.new_thread(end, arguments, name="perqueue-end").start()
    except RuntimeError:
        log.debug("dropped while the interpreter ends")
