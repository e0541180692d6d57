"""The drain lock: who holds it delivers. It is the operating system's, and ends with its process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from filelock import BaseFileLock


def drain_lock(outbox: Path) -> BaseFileLock:
    """Return the lock, not taken, in a file beside the outbox."""
    from filelock import FileLock  # 60 ms, needed only where something is delivered

    path = outbox.with_name(f"{outbox.name}-drain.lock")
    return FileLock(path, mode=0o600, thread_local=False, blocking=False)


def is_drained(outbox: Path) -> bool | None:
    """Tell whether some process holds the lock now; None if this user may not know."""
    from filelock import Timeout

    lock = drain_lock(outbox)
    if not os.path.exists(lock.lock_file):  # noqa: PTH110 - and none is made: it would be this user's
        return False
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return None
    lock.release()
    return False
