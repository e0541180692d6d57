"""What the recorder, the worker and the command line ask of an outbox, whatever it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Iterable, Sequence

    from perqueue._activity import Activity, Settlement, State

    Steps = Generator[tuple[str, tuple[object, ...]], list[Any], int]
    """Yields a statement with ``?`` for its values, is sent the rows that it gives, returns an ID."""


Key = tuple[str, str, str]
"""Billing ID, user ID and activity type ID."""


class Hold(NamedTuple):
    """Why nothing is sent, for other processes and for the next start."""

    kind: str
    """A value of :class:`perqueue._delivery.pace.Gate`."""
    reason: str
    until: int
    """No request before this time (milliseconds since the epoch)."""
    wait_ms: int
    """How long that was when it was stored: whatever the wall clock does, no wait is longer."""
    number: int = 0
    """Counts the holds of this outbox; given when it is stored."""


class Load(NamedTuple):
    """How busy the process that drains is, as it stored it in the last two seconds or so."""

    in_flight: int = 0
    """Requests that it was waiting for."""
    limit: int = 0
    """How many it would have had in flight at most."""
    rate: float | None = None
    """Requests a second that Per seems to take; None: it has not asked for fewer."""


class News(NamedTuple):
    """What other processes may have changed."""

    probe_requests: int
    """How often somebody asked, from any process, for a probe at once."""
    hold: Hold | None
    """Why nothing is sent."""


class Position(NamedTuple):
    """The outbox at one moment, all of it O(1)."""

    last_id: int
    """The highest ID ever given."""
    drained_through: int
    """Everything up to this ID is settled, or waits on its own account."""
    accepted: int
    rejected: int
    discarded: int
    damaged: int
    """Rows that are not what was recorded, or cannot be read: they were quarantined, or are missing."""
    pauses: int
    """The number of the latest hold, current or past."""
    rejections: int
    """How many refusals there ever were: the number of the latest."""
    refusal_streak: int
    """Refusals in a row for one reason, with nothing accepted between."""
    refusal_reason: str | None
    hold: Hold | None
    probe_requests: int
    """How often somebody asked, from any process, for a probe at once."""
    drainer_pid: int | None
    oldest_pending: tuple[int, int] | None
    """ID and recorded_at of the oldest pending activity."""
    missing: int = 0
    """Of the damaged ones, those that must be pending by the counters, and are not there."""
    load: Load = Load()
    counted: int | None = None
    """How many are pending, where IDs have gaps and do not tell."""

    @property
    def pending(self) -> int:
        """How many activities are pending."""
        if self.counted is not None:
            return self.counted
        left = self.last_id - self.accepted - self.rejected - self.discarded - self.damaged
        return max(left, 0 if self.oldest_pending is None else 1)  # counters can be damaged, too


class Settled(NamedTuple):
    """What became of one activity that is no longer pending."""

    state: State
    transaction_id: str | None
    reason: str | None
    settled_at: int


class DrainLock(Protocol):
    """Who has it may drain. filelock's, where only one may at a time."""

    def acquire(self) -> object:
        """Take it at once; raise ``filelock.Timeout`` if another process has it."""

    def release(self, force: bool = False) -> None:  # noqa: FBT001, FBT002 - filelock's
        """Let go of it."""


class Outbox(Protocol):
    """Durable storage of activities and their outcomes.

    Every method may raise :class:`~perqueue.OutboxError`, and none raises anything of the storage's own.
    """

    dialect: str
    """What SQLAlchemy and Django call this kind of database."""
    shared: bool
    """Whether several may drain it at a time."""
    claim_batch: int
    """Fewest activities to claim at a time."""
    settle_batch: int
    """Outcomes that are enough for a transaction,"""
    settle_delay: float
    """or seconds for which they gather."""
    follow_interval: float
    """Seconds between two looks at another process's outcomes, while somebody here waits for them."""
    lost: Collection[int]
    """Activities of the latest :meth:`settle` that had become another's: nothing was written."""
    epoch: int
    """How often numbers were found to be taken back: what was given one before may be another's, or gone."""

    @property
    def outbox_id(self) -> str:
        """What this outbox is told from all others by, wherever it lies."""

    def append(self, billing_id: str, user_id: str, activity_type_id: str, recorded_at: int) -> int:
        """Commit one activity and return its ID."""

    def append_once(self, key: Key, window: tuple[int, int], recorded_at: int) -> int:
        """Commit one activity, unless an equal one stands for it in a window; return the ID of which does.

        ``window`` is its beginning and its end, in milliseconds since the epoch. One that Per refused stands
        for no other.
        """

    def joining(
        self,
        key: Key,
        window: tuple[int, int] | None,
        recorded_at: int,
        driven: object,
        *,
        quietly: bool = False,
    ) -> Steps:
        """Yield what a connection has to run to make an activity part of its transaction; return the ID.

        ``driven`` is the driver's own connection. If there are several statements, the first writes nothing.
        ``quietly``: the commit can wake nobody.
        """

    def refusals(self) -> int:
        """Return a number that differs when one was refused, found to be damaged, or taken back."""

    def claim(self, after: int, limit: int) -> list[Activity]:
        """Return fresh pending activities above an ID, oldest first; damaged rows are settled as such."""

    def claim_due(self, now: int, farthest: int, limit: int, outstanding: Collection[int]) -> list[Activity]:
        """Return pending activities whose own wait ended by ``now``, less the outstanding ones.

        A wait that ends after ``farthest`` cannot be right (the clock was set back), and has ended too.
        """

    def next_due(self) -> int | None:
        """Return the earliest end of an activity's own wait."""

    def claim_waiting(self, after: int, limit: int) -> list[Activity]:
        """Return pending activities above an ID that wait on their own account, whatever their time."""

    def claim_newest(self) -> list[Activity]:
        """Return the activity that was recorded last, if this drainer may send it."""

    def drain_lock(self) -> DrainLock:
        """Return what a process must hold to drain: one at a time, or any number of them."""

    def is_drained(self) -> bool | None:
        """Tell whether some process drains now; None if this user may not know."""

    def holds_lease(self) -> bool:
        """Tell whether what was claimed is still this drainer's: if not, nothing of it may be sent."""

    def keep_lease(self) -> float | None:
        """Say that this drainer is alive; called every two seconds or so.

        Returns the mean of the rates (requests a second) that drainers of this outbox have found Per to take
        from them, if there are several.
        """

    def stay_awake(self) -> None:
        """Look for what others did more often, for a while."""

    def take_probe(self) -> bool:
        """Tell whether this drainer, of all of them, may ask whether Per answers again."""

    def settle(
        self,
        settlements: Sequence[Settlement],
        *,
        drained_through: int,
        refusals: tuple[int, str | None],
        take_back: tuple[Sequence[int], Hold] | None = None,
        epoch: int = 0,
    ) -> Hold | None:
        """Write outcomes, the watermark and the streak of refusals in one transaction.

        ``take_back`` names refused activities, of these or earlier ones, that return to pending in the
        same transaction, and why nothing is sent from then on; that hold is returned as stored. All this is
        of an ``epoch``: in another one only outcomes are written, of what was claimed and is still there.
        """

    def set_hold(self, hold: Hold | None) -> Hold | None:
        """Store why nothing is sent, and return it with its number."""

    def set_drainer(self, pid: int | None, load: Load) -> None:
        """Store which process drains, and how busy it is."""

    def request_probe(self) -> None:
        """Ask the draining process, whichever it is, to try at once."""

    def position(self) -> Position:
        """Return counters and watermark."""

    def news(self) -> News:
        """Return what other processes may have changed: less than the position, and cheaper."""

    def settled(self, activity_ids: Iterable[int]) -> dict[int, Settled]:
        """Return the outcomes of those that have one."""

    def count_pending(self, through: int, limit: int) -> int:
        """Count the pending activities up to an ID, up to a limit."""

    def last_reason(self, activity_id: int) -> str | None:
        """Return why the latest attempt to deliver an activity failed; None if none has."""

    def rejected_since(self, rejection: int, limit: int) -> list[Activity]:
        """Return activities that are rejected now, by refusals after a number."""

    def change_counter(self) -> int:
        """Return a number that differs when another process has written."""

    def expire(self, before: int, limit: int) -> bool:
        """Forget windows that ended before a time, up to ``limit`` keys; tell whether there may be more."""

    def prune(self, before: int, keep: int, limit: int) -> bool:
        """Look at ``limit`` settled activities and delete those settled before a time or beyond ``keep``.

        Returns whether there may be more to delete; otherwise the next call begins anew.
        """

    def close(self) -> None:
        """Sync and close; idempotent."""
