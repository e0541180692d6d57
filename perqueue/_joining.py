"""Recording in a transaction of the caller's, whichever library its connection is of.

None of those libraries is imported here: whoever passes a connection has imported its library. What they
have in common is told by the outbox (:data:`perqueue._outbox.protocol.Steps`), so that any backend needs no
more than its own statements.
"""

from __future__ import annotations

import functools
import sqlite3
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from perqueue._activity import Activity
from perqueue._joints import async_joint_of, commits_each, is_two_phase, joint_of, sqlalchemy_run_sync
from perqueue._outbox.connection import TAMPERED, is_tampered
from perqueue.exceptions import ConfigurationError, OutboxError, PerQueueError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from perqueue._joints import AsyncJoint, Joint
    from perqueue._outbox import Key, Outbox
    from perqueue._outbox.protocol import Steps

_MISUSES = {"InterfaceError", "NotSupportedError", "ProgrammingError"}
"""What drivers raise for a connection that is closed, or another thread's, or lacks the tables (PEP 249)."""


class Entry(NamedTuple):
    """An activity that is to exist exactly if the caller's transaction is committed."""

    outbox: Outbox
    key: Key
    window: tuple[int, int] | None
    recorded_at: int
    wake: Callable[..., object]
    """Called after the commit, where the library tells of it (elsewhere the drain notices it by itself)."""


def join(connection: Any, entry: Entry) -> int:
    """Record in the transaction that is open on a connection, and return the ID of the activity.

    Raises :class:`ConfigurationError` if this connection cannot be used, or :class:`OutboxError`; nothing
    else comes out.
    """
    with _errors(entry):
        joint = joint_of(connection)
        _check_dialect(joint.dialect, entry)
        steps = _together(joint, entry)
        try:
            request = next(steps)
            while True:
                try:
                    rows = joint.run(*request)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, having tidied up
                    request = steps.throw(error)
                else:
                    request = steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
        with suppress(Exception):  # it is recorded: who cannot be told of the commit notices it
            joint.when_committed(entry.wake)
    return activity_id


async def ajoin(connection: Any, entry: Entry) -> int:
    """Do as :func:`join`, on a connection whose methods are awaited."""
    with _errors(entry):
        if (run_sync := sqlalchemy_run_sync(connection)) is not None:
            joined: int = await run_sync(functools.partial(join, entry=entry))
            return joined
        joint = async_joint_of(connection)
        await joint.prepare()
        _check_dialect(joint.dialect, entry)
        steps = _together(joint, entry)
        try:
            request = next(steps)
            while True:
                try:
                    rows = await joint.run(*request)
                except BaseException as error:  # noqa: BLE001 - the steps raise it, having tidied up
                    request = steps.throw(error)
                else:
                    request = steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
    return activity_id


def _together(joint: Joint | AsyncJoint, entry: Entry) -> Steps:
    """Have the steps committed together, also where each would be by itself.

    Else the activity could be there without the window that it stands for, or with an error that denies it.
    """
    # PostgreSQL prepares no transaction that notifies: there who sleeps finds it by itself.
    quietly = is_two_phase(joint)
    steps = entry.outbox.joining(entry.key, entry.window, entry.recorded_at, joint.driven, quietly=quietly)
    rows = yield next(steps)  # which only asks, but begins what the library begins before any statement
    alone = entry.window is not None and commits_each(joint)
    begun = False
    try:
        if alone:
            yield "BEGIN IMMEDIATE", ()
            begun = True
        try:
            while True:
                rows = yield steps.send(rows)
        except StopIteration as end:
            activity_id: int = end.value
        if alone:
            yield "COMMIT", ()
    except BaseException as error:
        # A BEGIN that failed may have met another's transaction; one that was cancelled may yet succeed.
        if begun or (alone and not isinstance(error, Exception)):
            with suppress(Exception):
                yield "ROLLBACK", ()
        raise
    return activity_id


def _check_dialect(dialect: str, entry: Entry) -> None:
    if dialect != entry.outbox.dialect:
        message = f"connection leads to a {dialect} database, and the outbox is in {entry.outbox.dialect}"
        raise ConfigurationError(message)


# -- what the libraries' errors mean


@contextmanager
def _errors(entry: Entry) -> Iterator[None]:
    try:
        yield
    except PerQueueError as error:
        _name(error, entry)
        raise
    except Exception as error:  # noqa: BLE001 - whatever its library raises
        ours, cause = _ours(error)
        _name(ours, entry)
        raise ours from cause


def _name(error: PerQueueError, entry: Entry) -> None:
    if isinstance(error, OutboxError):
        billing_id, user_id, kind = entry.key
        error.activity = Activity(
            id=0,
            billing_id=billing_id,
            user_id=user_id,
            activity_type_id=kind,
            recorded_at=entry.recorded_at,
        )


def _ours(error: Exception) -> tuple[PerQueueError, BaseException]:
    """Return our error, and the driver's own: SQLAlchemy's text has all values in it."""
    cause = getattr(error, "orig", None) or error
    if type(error.__cause__).__name__ == type(error).__name__:  # Django's wrap the driver's of the same name
        cause = error.__cause__
    why = str(cause).partition("\n")[0] or type(cause).__name__
    kinds = {kind.__name__ for kind in type(cause).__mro__}
    by_django = type(cause).__module__.startswith("django.")  # which has not asked the driver
    if "Error" in kinds and not kinds & _MISUSES and not by_django:
        if is_tampered(cause):
            why = f"{why} ({TAMPERED})"
        message = f"not recorded, and the transaction it was to be part of had better be rolled back: {why}"
        return OutboxError(message), cause
    return ConfigurationError(f"not recorded, because the connection cannot be used: {why}"), cause


def explain_lock(error: OutboxError) -> None:
    """Say what to do if the lock that was waited for may be the caller's own."""
    code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        hint = (
            "if that was a transaction of this very thread, record(..., connection=...) makes this part of it"
        )
        error.args = (f"{error}; {hint}",)
