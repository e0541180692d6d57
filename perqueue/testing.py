"""A test kit: a local Per with faults by plain names, queues that speak to it, and assertions.

With pytest the fixtures `per_sandbox`, `per_queue` and `per_environment` are there without an import; outside
of it `sandbox_queue()` and `sandbox_environment()` do the same. Needs `useper-perqueue[sandbox]`.

::

    from perqueue.testing import assert_recorded, sandbox_queue

    with sandbox_queue() as (queue, per):
        with per.outage():
            queue.record("GROUP_A", "USER_1")
        assert_recorded(queue, user_id="USER_1", times=1)
        queue.flush()
        assert per.unique("GROUP_A") == 1
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from perqueue import _ending
from perqueue._audit import ActivityRecord, history
from perqueue._recorder import PerQueue
from perqueue._settings import RetryPolicy, outbox_place
from perqueue._words import counted
from perqueue.exceptions import ConfigurationError, OutboxMismatch, PerQueueError, QueueClosed
from perqueue.sandbox import (
    BadToken,
    Latency,
    RateLimit,
    ReceivedActivity,
    Refuse,
    ResetAfterAccepting,
    Sandbox,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from perqueue._address import DatabaseURL

__all__ = ["LocalPer", "assert_delivered", "assert_recorded", "sandbox_environment", "sandbox_queue"]

_UNSET: Final = ("ACTIVITY_TYPE_ID", "PERQUEUE_DRAIN")
"""Variables that would change what a queue does with the others."""
_SHOWN: Final = 20
_IDS: Final = ("billing_id", "user_id", "activity_type_id")

_began: dict[Path | DatabaseURL, int] = {}
"""Outboxes that several tests share -> the last activity of those before the present one."""


class LocalPer(Sandbox):
    """A `Sandbox` whose faults have plain names.

    Each fault begins with the call and lasts until `recover()`, or until the end of a `with` block:
    `with per.outage(): ...`. They are for `record()` and what follows; reports are not touched, except by an
    outage. `set_fault()` has many more.
    """

    def outage(self) -> AbstractContextManager[object]:
        """Refuse all connections."""
        self.go_down()
        return self._until_recovery()

    def rejects(
        self,
        reason: str = "rejected",
        *,
        billing_id: str | None = None,
        user_id: str | None = None,
        activity_type_id: str | None = None,
    ) -> AbstractContextManager[object]:
        """Refuse activities for this reason: all, or those with these IDs."""
        wanted = _given(billing_id, user_id, activity_type_id)
        self.set_fault(Refuse(reason), when=(lambda one: not _differing(one, wanted)) if wanted else None)
        return self._until_recovery()

    def slow(self, seconds: float = 1.0) -> AbstractContextManager[object]:
        """Answer so many seconds late; activities count at their arrival."""
        self.set_fault(Latency(seconds))
        return self._until_recovery()

    def bad_token(self) -> AbstractContextManager[object]:
        """Refuse the activity token."""
        self.set_fault(BadToken())
        return self._until_recovery()

    def rate_limit(self, per_second: float, burst: int | None = None) -> AbstractContextManager[object]:
        """Answer 429 with `Retry-After` (in whole seconds) beyond this rate."""
        self.set_fault(RateLimit(per_second, burst))
        return self._until_recovery()

    def lost_answers(self, times: int | None = None) -> AbstractContextManager[object]:
        """Accept activities and break the connection instead of answering: to so many requests, or all."""
        self.set_fault(ResetAfterAccepting(), times=times)
        return self._until_recovery()

    def recover(self) -> None:
        """End every fault. A queue notices by itself within its backoff, and at once in `flush()`."""
        self.clear_faults()
        self.release()
        with suppress(RuntimeError):  # it was stopped: that is no fault
            self.come_back()

    def environment(self, outbox: str | os.PathLike[str]) -> dict[str, str]:
        """Return the environment variables with which `PerQueue()` delivers that outbox to this Per."""
        return {
            "PER_BASE_URL": self.url,
            "PER_ACTIVITY_TOKEN": self.activity_token,
            "PER_REPORTING_TOKEN": self.reporting_token,
            "PER_ACTIVITY_TYPE_ID": self.activity_type_id,
            "PERQUEUE_OUTBOX": os.fspath(outbox),
        }

    def _until_recovery(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.callback(self.recover)
        return stack


@contextmanager
def sandbox_queue(
    outbox: str | os.PathLike[str] | None = None, *, per: LocalPer | None = None, **options: Any
) -> Iterator[tuple[PerQueue, LocalPer]]:
    """Run a local Per, and a queue that delivers to it; both end with the block.

    `outbox` is a temporary file unless given, `per` a Per of its own unless one that runs is given; `options`
    are those of `PerQueue`. The queue waits less after a failure than it would in production (0.2 s at most).
    Leaving the block closes the queue without waiting for delivery: `queue.flush()` where that matters.
    """
    with ExitStack() as stack:
        if per is None:
            per = stack.enter_context(LocalPer())
        if outbox is None:
            outbox = Path(stack.enter_context(TemporaryDirectory(prefix="perqueue-"))) / "activities.db"
        defaults: dict[str, Any] = {
            "base_url": per.url,
            "activity_token": per.activity_token,
            "reporting_token": per.reporting_token,
            "activity_type_id": per.activity_type_id,
            "drain": True,
            "exit_timeout": 0.5,
            "retry": RetryPolicy(base=0.02, cap=0.2),
        }
        queue = PerQueue(outbox, **(defaults | options))
        stack.callback(queue.close)
        stack.callback(per.recover)  # before: a request that hangs would delay it
        yield queue, per


@contextmanager
def sandbox_environment(
    outbox: str | os.PathLike[str] | None = None, *, per: LocalPer | None = None
) -> Iterator[LocalPer]:
    """Run a local Per, with environment variables that lead every `PerQueue()` made meanwhile to it.

    `outbox` is a temporary file unless given, `per` a Per of its own unless one that runs is given. Leaving
    the block restores the variables and closes the queues on that outbox that the application left open.
    """
    with ExitStack() as stack:
        if per is None:
            per = stack.enter_context(LocalPer())
        if outbox is None:
            outbox = Path(stack.enter_context(TemporaryDirectory(prefix="perqueue-"))) / "activities.db"
        stack.enter_context(_variables(per.environment(outbox)))
        stack.callback(_close_queues, outbox_place(outbox))
        stack.callback(per.recover)
        yield per


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in (*_UNSET, *variables)}
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _open_queues(place: Path | DatabaseURL) -> list[PerQueue]:
    queues = [queue for queue in list(_ending._open) if isinstance(queue, PerQueue)]  # noqa: SLF001
    return [queue for queue in queues if queue._settings.outbox == place]  # noqa: SLF001


def _close_queues(place: Path | DatabaseURL) -> None:
    for queue in _open_queues(place):
        queue._close(0.5)  # noqa: SLF001
    _began.pop(place, None)


def begin_test(per: LocalPer, outbox: str | os.PathLike[str]) -> None:
    """Let a test that shares a Per and an outbox with earlier ones see nothing of them."""
    per.recover()
    place = outbox_place(outbox)
    for queue in _open_queues(place):
        with suppress(PerQueueError):
            if queue._settings.drain and queue.stats().pending:  # noqa: SLF001
                queue.flush(timeout=2)
    per.reset()
    recorded = _since_then(place)
    if recorded:
        _began[place] = recorded[-1].id


def assert_recorded(
    outbox: PerQueue | str | os.PathLike[str] | None = None,
    *,
    billing_id: str | None = None,
    user_id: str | None = None,
    activity_type_id: str | None = None,
    times: int | None = None,
) -> None:
    """Fail unless activities with these IDs are in the outbox, whatever has become of them since.

    It looks once and waits for nothing: what `record()` returned for is there.

    :param outbox: a queue, or the path of an outbox; None: the one that `PERQUEUE_OUTBOX` names.
    :param billing_id: only activities with this one count; None: any. Likewise the other two.
    :param user_id: the user's.
    :param activity_type_id: the activity type's.
    :param times: exactly so many, 0 for none; None: at least one. With `coalesce` a repeat is not stored.

    Raises `AssertionError`, whose text shows what was recorded instead.
    """
    __tracebackhide__ = True
    wanted = _given(billing_id, user_id, activity_type_id)
    place, records = _recorded(outbox)
    found = sum(not _differing(record, wanted) for record in records)
    if found == times or (times is None and found):
        return
    expected = "at least 1" if times is None else str(times)
    raise AssertionError(
        f"expected {expected} recorded with {_words(wanted)}, found {found}\n"
        f"{_listed('recorded', records, wanted)}\noutbox: {place}" + ("" if records else f"\n{_hint(place)}")
    )


def assert_delivered(
    per: Sandbox,
    *,
    billing_id: str | None = None,
    user_id: str | None = None,
    activity_type_id: str | None = None,
    timeout: float = 5.0,
) -> None:
    """Fail unless Per accepts an activity with these IDs within `timeout` seconds, or has already.

    The only one that waits. `flush()` is quicker where the queue is at hand, and says why it failed.
    `per.unique()` and `per.activities` count.
    """
    __tracebackhide__ = True
    wanted = _given(billing_id, user_id, activity_type_id)
    deadline = time.monotonic() + timeout
    while True:
        activities = per.activities
        if any(not _differing(activity, wanted) for activity in activities):
            return
        try:
            per.wait_for(len(activities) + 1, max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            break
    faults = ", ".join(fault["name"] for fault in per.state()["faults"]) or "none"
    requests = counted(per.requests, "request")
    raise AssertionError(
        f"Per has accepted none with {_words(wanted)} within {timeout:g} s\n"
        f"{_listed('accepted', activities, wanted)}\n{per!r}, {requests}, faults: {faults}"
    )


def _recorded(
    outbox: PerQueue | str | os.PathLike[str] | None,
) -> tuple[Path | DatabaseURL, list[ActivityRecord]]:
    if isinstance(outbox, PerQueue):
        place = outbox._settings.outbox  # noqa: SLF001
        with suppress(QueueClosed):  # the application's shutdown may have closed it
            return place, outbox.history(limit=None, after=_began.get(place, 0))
    else:
        place = outbox_place(outbox or os.environ.get("PERQUEUE_OUTBOX"))
    return place, _since_then(place)


def _since_then(place: Path | DatabaseURL) -> list[ActivityRecord]:
    """Return what is in an outbox, if there is one, since the test began."""
    if isinstance(place, Path) and not place.exists():
        return []
    with suppress(OutboxMismatch):  # a database without one
        return history(place, limit=None, after=_began.get(place, 0))
    return []


def _given(*ids: str | None) -> dict[str, str]:
    wanted = {name: value for name, value in zip(_IDS, ids, strict=True) if value is not None}
    for name, value in wanted.items():
        if not isinstance(value, str):
            message = f"{name} must be a str, as in record(), not {type(value).__name__}"
            raise ConfigurationError(message)
    return wanted


def _differing(activity: object, wanted: Mapping[str, str]) -> list[str]:
    return [name for name, value in wanted.items() if getattr(activity, name) != value]


def _words(wanted: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in wanted.items()) or "any IDs"


def _listed(
    verb: str, activities: Sequence[ActivityRecord | ReceivedActivity], wanted: Mapping[str, str]
) -> str:
    """Show activities, what fits best first, and where each differs."""
    if not activities:
        return f"nothing was {verb}"
    judged = sorted(((_differing(one, wanted), one) for one in activities), key=lambda pair: len(pair[0]))
    lines = [f"what was {verb}, {len(activities)} in all:"]
    for differing, one in judged[:_SHOWN]:
        ids = ", ".join(f"{name}={getattr(one, name)!r}" for name in _IDS)
        state = f"  {one.state}" if isinstance(one, ActivityRecord) else ""
        reason = f": {one.reason}" if isinstance(one, ActivityRecord) and one.reason else ""
        apart = f"  <- another {' and '.join(differing)}" if differing else ""
        lines.append(f"  {ids}{state}{reason}{apart}")
    if len(judged) > _SHOWN:
        lines.append(f"  and {len(judged) - _SHOWN} more")
    return "\n".join(lines)


def _hint(place: Path | DatabaseURL) -> str:
    if isinstance(place, Path) and not place.exists():
        return "There is no such file yet: was a queue made, and for this outbox?"
    queues = [queue for queue in list(_ending._open) if isinstance(queue, PerQueue)]  # noqa: SLF001
    others = {queue._settings.outbox for queue in queues} - {place}  # noqa: SLF001
    if others:
        return f"This process has queues on other outboxes: {', '.join(sorted(map(str, others)))}"
    return "Was record() called, and on a queue for this outbox?"
