"""A sandbox in the foreground, for the command line."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

from perqueue.sandbox._server import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from perqueue.sandbox._ledger import ReceivedActivity, RequestSeen


def run(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    tokens: Mapping[str, Iterable[str]] | None = None,
    activity_types: Collection[str] | None = None,
    latency: float = 0.0,
    on_ready: Callable[[Sandbox], None] | None = None,
    on_request: Callable[[RequestSeen], None] | None = None,
    on_activity: Callable[[ReceivedActivity], None] | None = None,
) -> Sandbox:
    """Serve until SIGINT or SIGTERM, and return the stopped sandbox with all that it received.

    Call it from the main thread: only there signals can be handled. `on_ready` is called once it listens
    (set faults there); the callbacks and the other options are those of `Sandbox`.

    Raises:
        OSError: The port is taken, say.
        ValueError: This is not the main thread.
    """
    sandbox = Sandbox(
        host=host,
        port=port,
        tokens=tokens,
        activity_types=activity_types,
        latency=latency,
        on_request=on_request,
        on_activity=on_activity,
    )
    # A handler that only writes to a pipe can interrupt anything without harm.
    reader, writer = os.pipe()

    def stop(_number: int, _frame: object) -> None:
        os.write(writer, b"!")

    former: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            former[number] = signal.signal(number, stop)
        with sandbox:
            if on_ready is not None:
                on_ready(sandbox)
            os.read(reader, 1)
    finally:
        for handled, handler in former.items():
            signal.signal(handled, handler)
        os.close(reader)
        os.close(writer)
    return sandbox
