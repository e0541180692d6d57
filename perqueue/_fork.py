"""Who must let go before a fork, and forget after it.

SQLite's file locks belong to a process and its connections cannot cross a fork (SQLite's documentation,
"How To Corrupt An SQLite Database File", section 2.6). So every outbox is closed in the parent *before*
the fork, under its lock, and opened again by whichever side uses it next.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol

from perqueue import _threads


class ForkAware(Protocol):
    """Something that takes part in a fork. None of the three may raise."""

    def before_fork(self) -> None:
        """Take the locks, close what cannot cross."""

    def after_fork_in_parent(self) -> None:
        """Release the locks."""

    def after_fork_in_child(self) -> None:
        """Replace the locks and forget threads, loop and sockets, without touching them."""


_participants: weakref.WeakSet[ForkAware] = weakref.WeakSet()
_entered: list[ForkAware] = []
quiet = _threads.RLock()
"""Held from before a fork until after it, and by whoever opens or closes what hooks do not know (yet)."""


def participate(participant: ForkAware) -> None:
    """Have the participant called around every later fork of this process, for as long as it lives."""
    with quiet:
        _participants.add(participant)


def withdraw(participant: ForkAware) -> None:
    """Stop calling the participant."""
    with quiet:
        _participants.discard(participant)


def _before() -> None:
    quiet.acquire()
    # Held strongly until the fork is over: what took its locks must be there to release them.
    for participant in list(_participants):
        _entered.append(participant)
        with suppress(Exception):
            participant.before_fork()


def _after_in_parent() -> None:
    while _entered:
        with suppress(Exception):
            _entered.pop().after_fork_in_parent()
    quiet.release()


def _after_in_child() -> None:
    global quiet  # noqa: PLW0603 - the old one's other waiters are not in this process
    quiet = _threads.RLock()
    while _entered:
        with suppress(Exception):
            _entered.pop().after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
