"""Threads and locks of the operating system, whatever gevent or eventlet have made of Python's.

Monkey-patching makes ``threading.Thread`` a greenlet of the thread that starts it. perqueue's must be real:
they wait for the disk, and run an event loop, of which a thread can have only one. So they are started past
the patch, and what they share is guarded by locks that are not patched either. Only whoever waits for them
(``flush()``, a receipt, ``close()``) sleeps as the patch has it: the other greenlets go on meanwhile.
"""

from __future__ import annotations

import _thread
import importlib
import sys
import threading
import time
from _queue import Empty, SimpleQueue  # the C module, which neither of them patches
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Empty",
    "Event",
    "Lock",
    "RLock",
    "SimpleQueue",
    "Thread",
    "check_event_loops",
    "is_current",
    "is_patched",
    "native_sleep",
    "new_event",
    "new_thread",
    "original",
    "pause",
]

_POLL = 0.005
"""Seconds between two looks of a greenlet at what a real thread does."""


def original(module: str, name: str) -> Any:
    """Return what a module of the standard library held before it was patched, if it was."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_object_patched(module, name):
        return gevent.get_original(module, name)
    if eventlet is not None and eventlet.already_patched:
        return getattr(eventlet.original(module), name)
    return getattr(importlib.import_module(module), name)


_start_new_thread = original("_thread", "start_new_thread")
_get_ident = original("_thread", "get_ident")
native_sleep: Callable[[float], None] = original("time", "sleep")
"""Sleep, greenlets and all: for microseconds, with a lock held."""
RLock: type[threading.RLock] = original("_thread", "RLock")
Lock: Callable[[], threading.Lock] = original("_thread", "allocate_lock")

_ours: set[int] = set()


def is_patched() -> bool:
    """Tell whether a new ``threading.Thread`` would be a greenlet."""
    return _thread.start_new_thread is not _start_new_thread


def check_event_loops() -> None:
    """Raise RuntimeError where no thread can run an event loop: asyncio's own locks are eventlet's then."""
    # gevent's locks work between real threads, eventlet's do not ("Cannot switch to a different thread").
    if is_patched() and "gevent" not in _thread.start_new_thread.__module__:
        message = "eventlet has patched the threads; `perqueue drain` delivers, in a process of its own"
        raise RuntimeError(message)


class Thread(Protocol):
    """What perqueue asks of a thread."""

    @property
    def ident(self) -> int | None: ...

    def start(self) -> None:
        """Raise RuntimeError if the interpreter is shutting down."""

    def join(self, timeout: float | None = None) -> None: ...

    def is_alive(self) -> bool: ...


class Event(Protocol):
    """What perqueue asks of an event."""

    def set(self) -> None: ...

    def clear(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


def new_thread(target: Callable[..., object], args: tuple[Any, ...] = (), *, name: str) -> Thread:
    """Return a daemon thread, not started."""
    if is_patched():
        return _RealThread(target, args)
    return threading.Thread(target=target, args=args, name=name, daemon=True)


def new_event() -> Event:
    """Return an event for a user's thread, or greenlet, to wait for."""
    return _PolledEvent() if is_patched() else threading.Event()


def is_current(thread: Thread | None) -> bool:
    """Tell whether this is the thread."""
    return thread is not None and thread.ident == _get_ident()


def pause(seconds: float) -> None:
    """Let other greenlets go on, if the caller is one."""
    (native_sleep if _get_ident() in _ours else time.sleep)(seconds)


class _PolledEvent:
    """An event that a real thread sets and a greenlet waits for."""

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._is_set:
            left = _POLL if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            pause(min(left, _POLL))
        return True


class _RealThread:
    """A daemon thread past the patch, for which a greenlet can wait."""

    def __init__(self, target: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._target = target
        self._args = args
        self._ended = _PolledEvent()
        self.ident: int | None = None

    def start(self) -> None:
        if (gevent := sys.modules.get("gevent")) is not None:
            gevent.get_hub()  # imports what the thread's own would: two threads that did would wait for ever
        _start_new_thread(self._run, ())

    def _run(self) -> None:
        self.ident = _get_ident()
        _ours.add(self.ident)
        try:
            self._target(*self._args)
        finally:
            if (gevent := sys.modules.get("gevent")) is not None:
                gevent.get_hub().destroy(destroy_loop=True)  # each thread's first socket makes one
            _ours.discard(self.ident)
            self._ended.set()

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def is_alive(self) -> bool:
        return self.ident in _ours
