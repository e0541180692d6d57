"""A fork must not matter: the child lets go of the sandbox's sockets, and forgets its thread.

Otherwise a port would stay open for as long as the child lives, and a reset would never be sent, because
the kernel acts on a socket only when its last holder closes it.
"""

import contextlib
import os
import weakref
from collections.abc import Iterable
from typing import Protocol


class Forkable(Protocol):
    """What a fork concerns."""

    def descriptors(self) -> Iterable[int]:
        """Return the file descriptors of its sockets."""

    def abandon(self) -> None:
        """Become a stopped one, in the child, without touching thread, loop or sockets."""


_all: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(sandbox: Forkable) -> None:
    """See to this one after every fork."""
    _all.add(sandbox)


def _in_child() -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for sandbox in tuple(_all):
        for descriptor in sandbox.descriptors():
            # Replaced, not closed: the inherited objects still believe that the number is theirs.
            with contextlib.suppress(OSError):
                os.dup2(nowhere, descriptor, inheritable=False)
        sandbox.abandon()
    os.close(nowhere)


os.register_at_fork(after_in_child=_in_child)
