"""The drain lock: who holds it delivers. It is the operating system's, and ends with its process."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from perqueue._place import make_for_owner

if TYPE_CHECKING:
    from filelock import BaseFileLock


def drain_lock(outbox: Path) -> BaseFileLock:
    """Return the lock, not taken, in a file beside the outbox."""
    from filelock import FileLock  # 60 ms, needed only where something is delivered

    path = f"{outbox}-drain.lock"
    with suppress(OSError):  # taking the lock says why not
        make_for_owner(path, outbox)
    return FileLock(path, mode=0o600, thread_local=False, blocking=False)


def is_drained(outbox: Path) -> bool | None:
    """Tell whether some process holds the lock now; None if this user may not know."""
    from filelock import Timeout

    if not Path(f"{outbox}-drain.lock").exists():  # and none is made for nothing
        return False
    lock = drain_lock(outbox)
    try:
        lock.acquire()
    except Timeout:
        return True
    except OSError:
        return None
    lock.release()
    return False
