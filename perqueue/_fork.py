"""Who must let go before a fork, and forget after it.

SQLite's file locks belong to a process and its connections cannot cross a fork (SQLite's documentation,
"How To Corrupt An SQLite Database File", section 2.6). So every outbox is closed in the parent *before*
the fork, under its lock, and opened again by whichever side uses it next.
"""

from __future__ import annotations

import os
import threading
import weakref
from contextlib import suppress
from typing import Protocol


class ForkAware(Protocol):
    """Something that takes part in a fork. None of the three may raise."""

    def before_fork(self) -> None:
        """Take the locks, close what cannot cross."""

    def after_fork_in_parent(self) -> None:
        """Release the locks."""

    def after_fork_in_child(self) -> None:
        """Replace the locks and forget threads, loop and sockets, without touching them."""


_participants: weakref.WeakSet[ForkAware] = weakref.WeakSet()
# By thread: two threads may fork at once, and each releases what it took.
_entered: dict[int, list[ForkAware]] = {}


def participate(participant: ForkAware) -> None:
    """Have the participant called around every later fork of this process, for as long as it lives."""
    _participants.add(participant)


def withdraw(participant: ForkAware) -> None:
    """Stop calling the participant."""
    _participants.discard(participant)


def _before() -> None:
    # Held strongly until the fork is over: what took its locks must be there to release them.
    entered = _entered[threading.get_ident()] = list(_participants)
    for participant in entered:
        with suppress(Exception):
            participant.before_fork()


def _after_in_parent() -> None:
    for participant in reversed(_entered.pop(threading.get_ident(), [])):
        with suppress(Exception):
            participant.after_fork_in_parent()


def _after_in_child() -> None:
    entered = _entered.pop(threading.get_ident(), [])
    _entered.clear()
    for participant in reversed(entered):
        with suppress(Exception):
            participant.after_fork_in_child()


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
