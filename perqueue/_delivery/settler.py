"""Writing down what came of requests, and why none are sent."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from perqueue._activity import TRANSITIONS, Event, Settlement, State
from perqueue._delivery.pace import PROBE_INTERVAL
from perqueue._outbox import Hold, Settled
from perqueue._stats import Gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._activity import Activity
    from perqueue._clock import Clock
    from perqueue._delivery.feed import Feed
    from perqueue._delivery.pace import Pace
    from perqueue._outbox import Outbox, Position

REFUSAL_STREAK = 20
"""Refusals in a row for one reason, with nothing accepted, that mean it is not the activities' fault."""


class Observer(Protocol):
    """Who is told what the drain did. Called on the drain's thread; must be quick, and must not raise."""

    def on_settled(self, outcomes: dict[int, Settled], rejected: list[Activity]) -> None:
        """These activities are no longer pending."""

    def on_hold(self, hold: Hold) -> None:
        """A probe failed, or Per asked to wait; stored before this call."""

    def on_tick(self) -> None:
        """Called every two seconds or so."""

    def awaited(self) -> list[int] | None:
        """Return the activities that somebody waits for; None if nobody waits for anything."""


class Settler:
    """Gathers outcomes and settles them in batches; one that cannot be written is held until it can.

    Twenty refusals in a row for one reason are taken back to pending, by invariant: then it is not the
    activities' fault. The streak so far is stored, because a job that starts every minute may never see
    twenty in one run.
    """

    def __init__(
        self,
        outbox: Outbox,
        feed: Feed,
        pace: Pace,
        observer: Observer,
        clock: Clock,
        *,
        wake: Callable[[], object],
    ) -> None:
        self._outbox = outbox
        self._feed = feed
        self._pace = pace
        self._observer = observer
        self._clock = clock
        self._wake = wake
        self._outcomes: list[Settlement] = []
        self._streak: list[int] = []
        self._streak_reason: str | None = None
        self._epoch = outbox.epoch
        self._hold: Hold | None = None
        self._stored: tuple[Gate | None, float] | None = None
        self._shares = False  # whether the hold that is stored concerns other drainers, too
        self.due_at: float | None = None
        """When the outcomes that have gathered are to be written (monotonic seconds)."""

    def __len__(self) -> int:
        return len(self._outcomes)

    @property
    def is_done(self) -> bool:
        """Whether everything is written down: outcomes, and why nothing is sent."""
        return not self._outcomes and (self._pace.gate is None or self._closed() == self._stored)

    def _closed(self) -> tuple[Gate | None, float]:
        """Return which gate is closed, and since when."""
        return self._pace.gate, self._pace.closed_at

    def begin(self, position: Position, retry_after_cap: float) -> None:
        """Take over what an earlier drainer had stored: a wait that Per asked for, a pause, a streak."""
        hold = self._hold = position.hold
        lasting = {Gate.RETRY_AFTER, Gate.REFUSED} | ({Gate.BACKING_OFF} if self._outbox.shared else set())
        if hold is not None and hold.kind in lasting:
            longest = PROBE_INTERVAL if hold.kind == Gate.REFUSED else retry_after_cap
            left = min(hold.until - self._clock.time_ms(), hold.wait_ms)  # the clock may have been set back
            wait = min(max(0, left) / 1000, longest)
            # What another drainer was asked outweighs what this process found out in an earlier term.
            if self._pace.gate is None or (hold.kind == Gate.RETRY_AFTER and wait > self._pace.wait()):
                self._pace.resume(Gate(hold.kind), hold.reason, wait)
        if self._pace.gate is not None:
            self._stored = self._closed()
        self._streak_reason = position.refusal_reason
        if position.refusal_streak:
            since = position.rejections - position.refusal_streak
            refused = self._outbox.rejected_since(since, REFUSAL_STREAK - 1)
            self._streak = [activity.id for activity in refused if activity.reason == self._streak_reason]

    def follow(self, hold: Hold | None) -> None:
        """Wait with the other drainers, where there are any, and try when one of them got through."""
        known = self._hold
        if hold is None:
            if self._shares and known is not None and self._pace.gate is not None:
                self._hold = self._stored = None
                self._shares = False
                self._pace.wake()
            return
        self._shares = True
        if known is not None and hold.number <= known.number:
            return
        self._hold = hold
        if hold.kind == Gate.BAD_TOKEN:
            return  # another's: this one's may be good
        if hold.kind == Gate.REFUSED and self._streak_reason == hold.reason:
            hold = self._take_back(hold)
        wait = max(0, min(hold.until - self._clock.time_ms(), hold.wait_ms)) / 1000
        self._pace.failures += 1  # the fleet's round, whoever tried
        self._pace.resume(Gate(hold.kind), hold.reason, wait)
        self._stored = self._closed()
        self._observer.on_hold(hold)

    def _take_back(self, hold: Hold) -> Hold:
        """Make those pending again that were refused here while another drainer found out why."""
        self.settle(now=True)
        if self._streak:
            taken = (self._streak, hold)
            hold = self._outbox.settle([], drained_through=0, refusals=(0, None), take_back=taken) or hold
            self._hold = hold
            self.end_streak()
            self._feed.look_again()
        return hold

    @property
    def is_streak(self) -> bool:
        """Whether so many were refused in a row that it is not their fault."""
        return len(self._streak) >= REFUSAL_STREAK

    def extend_streak(self, activity: Activity, reason: str) -> None:
        """One more was refused."""
        self._streak = [*self._streak, activity.id] if reason == self._streak_reason else [activity.id]
        self._streak_reason = reason

    def end_streak(self) -> None:
        """One was accepted."""
        self._streak, self._streak_reason = [], None

    def put(
        self,
        activity: Activity,
        event: Event,
        sent_at: float,
        *,
        transaction_id: str | None = None,
        reason: str | None = None,
        not_before: int | None = None,
    ) -> None:
        """Take an outcome; it is written soon, together with others."""
        if self.due_at is None:
            self.due_at = self._clock.monotonic() + self._outbox.settle_delay
            self._wake()  # whoever rests must learn of it
        self._outcomes.append(
            Settlement(
                activity=activity,
                event=event,
                answered_at=self._clock.time_ms(),
                duration_ms=max(0, int((self._clock.monotonic() - sent_at) * 1000)),
                transaction_id=transaction_id,
                reason=reason,
                not_before=not_before,
            )
        )

    def hurry(self) -> None:
        """Write what has gathered at the next occasion."""
        self.due_at = self._clock.monotonic()
        self._wake()

    def settle(self, *, now: bool = False) -> None:
        """Write the outcomes if it is time, or at once. Raises :class:`OutboxError`, and keeps them then."""
        if self.due_at is None or (self._clock.monotonic() < self.due_at and not now):
            return
        while self._outcomes:
            # With a streak all at once, so that no one ever sees those refused that are taken back.
            batch = self._outcomes[: None if self.is_streak else 2 * self._outbox.settle_batch]
            take_back = None
            if self.is_streak:
                take_back = (self._streak, self._new_hold(Gate.REFUSED, self._streak_reason))
            leaving = {s.activity.id for s in batch if s.event is not Event.DEFER or s.not_before is not None}
            taken_back = self._outbox.settle(
                batch,
                drained_through=self._feed.watermark(leaving),
                refusals=(len(self._streak), self._streak_reason),
                take_back=take_back,
                epoch=self._epoch,
            )
            del self._outcomes[: len(batch)]
            self._feed.leave(leaving)
            if any(s.not_before is not None for s in batch):
                self._feed.look_again()
            self._report(batch)
            if taken_back is not None:
                self._hold = taken_back
                self._stored = (Gate.REFUSED, self._pace.closed_at)
                self.end_streak()
                self._feed.look_again()
                self._observer.on_hold(taken_back)
        self.due_at = None

    def _report(self, batch: list[Settlement]) -> None:
        outcomes, rejected = {}, []
        unknown = {*self._outbox.lost, *(self._streak if self.is_streak else ())}
        for settlement in batch:
            state = TRANSITIONS[State.PENDING, settlement.event]
            if state is State.PENDING or settlement.activity.id in unknown:
                continue
            outcomes[settlement.activity.id] = Settled(
                state=state,
                transaction_id=settlement.transaction_id,
                reason=settlement.reason,
                settled_at=settlement.answered_at,
            )
            if state is State.REJECTED:
                rejected.append(replace(settlement.activity, reason=settlement.reason))
        if outcomes:
            self._observer.on_settled(outcomes, rejected)

    def _new_hold(self, gate: Gate, reason: str | None) -> Hold:
        wait = int(self._pace.wait() * 1000)
        return Hold(kind=gate, reason=reason or "", until=self._clock.time_ms() + wait, wait_ms=wait)

    def store_hold(self, *, answered: bool) -> None:
        """Store why nothing is sent, or that it is over, whenever that has changed.

        ``answered`` says whether anything has got through in this term: a restart does not make a token
        good, and a pause is shown until then.
        """
        gate = self._pace.gate
        if gate is None:
            if self._hold is not None and answered:
                self._outbox.set_hold(None)
                self._hold = self._stored = None
            return
        if self._closed() != self._stored:
            hold = self._new_hold(gate, self._pace.reason)
            self._hold = self._outbox.set_hold(hold) or hold
            self._stored = self._closed()
            self._observer.on_hold(self._hold)
