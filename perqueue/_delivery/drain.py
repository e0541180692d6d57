"""Draining: claim, deliver, settle, for as long as this process is the elected one.

Everything here runs in one event loop. Activities come from the feed, are each sent in a request, and
leave with the transaction that settles what came of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue._activity import Event, Outcome, Verdict
from perqueue._complaints import where
from perqueue._delivery.feed import Feed
from perqueue._delivery.judge import Judge
from perqueue._delivery.settler import Settler
from perqueue._outbox import Load
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from perqueue._activity import Activity
    from perqueue._clock import Clock
    from perqueue._complaints import Complaints
    from perqueue._delivery.pace import Pace
    from perqueue._delivery.settler import Observer
    from perqueue._outbox import Outbox, Position
    from perqueue._settings import RetryPolicy

log = logging.getLogger("perqueue")

TICK = 0.085
"""Seconds after which a record() in another process is noticed at the latest."""
OUTBOX = "outbox"
"""The trouble that the outbox cannot be used, for the log."""
OBSERVER_INTERVAL = 2.0
"""Seconds between two looks of the observer, at whether delivery has stalled."""
_STUCK_RETRY = 0.5
_PRUNE_BATCH = 50
_PRUNE_INTERVAL = 60.0
_MOST_KEPT = 10_000_000
_EXPIRED_MS = 3_600_000
"""How long after its end a window is remembered: a clock may be set back a little."""


class Drain:
    """One term as the elected drainer."""

    def __init__(
        self,
        outbox: Outbox,
        deliver: Callable[[Activity], Awaitable[Outcome]],
        observer: Observer,
        pace: Pace,
        complaints: Complaints,
        *,
        policy: RetryPolicy,
        keep_delivered_ms: int,
        clock: Clock,
    ) -> None:
        self._outbox = outbox
        self._deliver = deliver
        self._observer = observer
        self._policy = policy
        self._keep_ms = keep_delivered_ms
        self._clock = clock
        self._pace = pace
        self._event = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None
        self._asleep = False
        self._stopping = False
        self._grace: float | None = None
        self._crash: BaseException | None = None

        self._epoch = outbox.epoch
        self._position = outbox.position()
        self._feed = Feed(outbox, pace, clock, policy.activity_cap, self._position.drained_through)
        self._lanes: set[asyncio.Task[None]] = set()
        self._settler = Settler(outbox, self._feed, pace, observer, clock, wake=self._event.set)
        self._complaints = complaints
        self._judge = Judge(
            self._feed,
            pace,
            self._settler,
            policy=policy,
            complaints=complaints,
            pending=lambda: outbox.position().pending,
            clock=clock,
        )
        self._load = Load()
        self._changes = self._probe_requests = -1
        self._denied_at = float("-inf")
        self._next_prune = self._next_tick = self._next_load = float("-inf")

        self.in_flight = 0
        """Requests that are being waited for."""
        self.trouble: str | None = None
        """Why outcomes cannot be stored or activities not be read; nothing is sent meanwhile."""

    # -- called from any thread

    def more(self) -> None:
        """There is a new activity. Cheap, unless the drain is asleep."""
        self._feed.fresh = True
        if self._asleep:
            self._asleep = False
            self._call(self._event.set)

    def probe(self, handled: Callable[[], object]) -> None:
        """Somebody waits: end a backoff now, and call ``handled``, unless this term is over."""
        self._call(self._probe, handled)

    def stop(self, grace: float) -> None:
        """Send nothing more; give requests in flight ``grace`` seconds to be answered."""
        self._call(self._stop, grace)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        with suppress(RuntimeError):  # the loop was closed: this term is over
            self._loop.call_soon_threadsafe(function, *args)

    # -- called in the loop

    def _probe(self, handled: Callable[[], object]) -> None:
        if self._stopping or self._judge.token_refused:
            return
        handled()
        self._wake()
        self._event.set()

    def _wake(self) -> None:
        """Somebody waits: give everything one fresh attempt, as soon as Per allows one."""
        self._outbox.stay_awake()
        self._judge.woken_at = self._clock.monotonic()
        self._pace.wake()
        self._feed.look_again(all_due=True)

    def _stop(self, grace: float) -> None:
        self._stopping = True
        self._grace = grace
        self._event.set()

    async def run(self) -> None:
        """Drain until stopped, until the token is refused, or until what was claimed is another's."""
        self._begin(self._position)
        try:
            while not self._stopping and not self._is_over():
                self._tick()
                self._turn()
                if self.trouble is not None or not self._is_over():
                    await self._rest()
                if self._crash is not None:
                    raise self._crash
        finally:
            await self._finish()

    def _is_over(self) -> bool:
        """Tell whether this term is, and everything is written down that was answered in it."""
        if not self._judge.token_refused and self._holds_claims():
            return False
        return not self._lanes and self._settler.is_done

    def _holds_claims(self) -> bool:
        """Tell whether what was claimed is this drain's still, and not of a past that is gone."""
        return self._outbox.holds_lease() and self._outbox.epoch == self._epoch

    def _begin(self, position: Position) -> None:
        self._load = Load(limit=self._pace.limit)
        self._outbox.set_drainer(os.getpid(), self._load)
        self._probe_requests = position.probe_requests
        self._settler.begin(position, self._policy.retry_after_cap)

    def _tick(self) -> None:
        """Have the observer look; also while outcomes cannot be written, which is a way to stall."""
        now = self._clock.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + OBSERVER_INTERVAL
            self._observer.on_tick()

    def _turn(self) -> None:
        """Do everything that can be done without waiting."""
        try:
            self._settler.settle()
            self._settler.store_hold(answered=self._judge.answered_at > float("-inf"))
            self._look_around()
            self._feed.fill()
            self.trouble = None
        except Exception as error:  # noqa: BLE001 - whatever it is, outcomes are held, and nothing is sent
            what = str(error) if isinstance(error, OutboxError) else where(error)
            self._complaints.tell(
                OUTBOX, logging.ERROR, f"delivery waits until the outbox works again: {what}"
            )
            self.trouble = str(error) or type(error).__name__
            return
        lasted = self._complaints.over(OUTBOX)
        if lasted is not None:
            log.info("the outbox works again after %s: delivery goes on", lasted)
        self._open_lanes()

    async def _rest(self) -> None:
        """Wait for an outcome, a wake-up, or the next thing that has its time."""
        now = self._clock.monotonic()
        # A sweep of what is old goes on though nothing else happens.
        wait = min(TICK, max(0.001, self._next_prune - now))
        sweeps = wait < TICK
        if self.trouble is not None:
            wait = _STUCK_RETRY
        else:
            if self._settler.due_at is not None:
                wait = min(wait, self._settler.due_at - now)
            if len(self._feed):
                wait = min(wait, self._until_next(wait))
        self._asleep = self._feed.hungry()
        if self._asleep and self._feed.fresh and self.trouble is None:
            wait = 0  # a record() came after the last look
        if wait > 0:
            busy = self.in_flight or len(self._settler) or self.trouble or self._feed.waiting()
            idle = not (sweeps or busy)
            self._alarm = self._loop.call_later(wait, self._peek if idle else self._event.set)
            await self._event.wait()
            self._alarm.cancel()
        else:
            await asyncio.sleep(0)
        self._asleep = False
        self._event.clear()

    def _until_next(self, otherwise: float) -> float:
        """Return the seconds until something may be sent, if only time stands against it."""
        if self._pace.gate is not None:
            denied = self._denied_at + TICK > self._clock.monotonic()
            if self.in_flight or denied:
                return otherwise
            return max(self._pace.wait(), self._pace.spacing(), 0.001)
        return self._pace.spacing() or otherwise

    def _peek(self) -> None:
        """Wake up only if another process has written: most of an idle process's life is spent here."""
        try:
            changed = self._outbox.change_counter() != self._changes
        except OutboxError:
            changed = True  # the next turn meets the error, too, and knows what to do
        if changed or self._clock.monotonic() >= self._next_tick:
            self._event.set()
        else:
            self._alarm = self._loop.call_later(TICK, self._peek)

    async def _finish(self) -> None:
        """Let requests in flight end, and settle them: what was accepted is not sent again."""
        self._stopping = True
        self._write_down(over=False)  # whoever waits need not wait for those in flight
        stopped_at = None
        while self._lanes:
            left = None
            if self._grace is not None:  # it may come while this waits
                stopped_at = stopped_at or self._clock.monotonic()
                left = stopped_at + self._grace - self._clock.monotonic()
                if left <= 0:
                    break
            self._event.clear()
            told = self._loop.create_task(self._event.wait())
            await asyncio.wait({told, *self._lanes}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
        lanes = set(self._lanes)
        for lane in lanes:
            lane.cancel()
        if lanes:
            await asyncio.wait(lanes, timeout=1.0)
        if not self._write_down(over=True) and len(self._settler):
            log.error(
                "%d outcomes could not be stored, and those activities will be sent again: %s",
                len(self._settler),
                self.trouble,
            )

    def _write_down(self, *, over: bool) -> bool:
        try:
            self._settler.settle(now=True)
            self._settler.store_hold(answered=self._judge.answered_at > float("-inf"))
            if over:
                self._outbox.set_drainer(None, Load())
        except Exception as error:  # noqa: BLE001 - there is a second try, and then it ends in any case
            self.trouble = str(error)
            return False
        return True

    # -- claiming

    def _look_around(self) -> None:
        """Notice what other processes did, and keep house."""
        changes = self._outbox.change_counter()
        if changes != self._changes:
            self._feed.look_again()
            news = self._outbox.news()
            self._settler.follow(news.hold)
            if self._outbox.shared:
                self._pass_on()
            if news.probe_requests != self._probe_requests:
                self._probe_requests = news.probe_requests
                self._wake()
            self._changes = changes
        now = self._clock.monotonic()
        if now >= self._next_load:
            self._tell_load()
            self._pace.share(self._outbox.keep_lease())
            self._next_load = now + OBSERVER_INTERVAL  # not if that raises: it shows when it is over
        if now >= self._next_prune:
            self._next_prune = now + _PRUNE_INTERVAL  # also if that raises: delivery matters more
            wall = self._clock.time_ms()
            more = self._outbox.prune(wall - self._keep_ms, _MOST_KEPT, _PRUNE_BATCH)
            if self._outbox.expire(wall - _EXPIRED_MS, _PRUNE_BATCH) or more:
                self._next_prune = now + 0.005

    def _tell_load(self) -> None:
        load = Load(self.in_flight, self._pace.limit, self._pace.rate)
        if load != self._load:
            self._outbox.set_drainer(os.getpid(), load)
            self._load = load

    def _pass_on(self) -> None:
        """Tell who waits here of what other drainers have settled."""
        awaited = self._observer.awaited()
        if awaited is not None:
            self._outbox.stay_awake()
        if awaited:
            self._observer.on_settled(self._outbox.settled(awaited), [])

    # -- delivering

    def _open_lanes(self) -> None:
        while (activity := self._next()) is not None:
            # As of now: before the lane runs, an answer may say that nothing more is to be sent.
            lane = self._loop.create_task(self._lane(activity, self._clock.monotonic()))
            self._lanes.add(lane)
            lane.add_done_callback(self._lane_ended)

    def _lane_ended(self, lane: asyncio.Task[None]) -> None:
        self._lanes.discard(lane)
        if not lane.cancelled() and lane.exception() is not None:
            self._crash = lane.exception()
            self._event.set()

    def _next(self) -> Activity | None:
        """Return what to send now, if anything may be sent."""
        if self._stopping or self._judge.token_refused or self.trouble is not None:
            return None
        if self.in_flight >= self._pace.allowance() or self._pace.spacing():
            return None
        if not self._holds_claims() or (self._pace.gate is not None and not self._may_probe()):
            return None
        activity = self._feed.next()
        if activity is not None:
            self._pace.sending()
            self.in_flight += 1
        return activity

    def _may_probe(self) -> bool:
        """Tell whether this drainer is to ask for all of them."""
        with suppress(OutboxError):  # the next turn meets it, too, and knows what to do
            if not len(self._feed) or self._outbox.take_probe():
                return True
        self._denied_at = self._clock.monotonic()
        return False

    async def _lane(self, first: Activity, sent_at: float) -> None:
        """Send one activity after the other."""
        activity: Activity | None = first
        while activity is not None:
            try:
                outcome = await self._deliver(activity)
            except BaseException as error:
                if self._is_cancelled():
                    # Per may have it all the same: who reconciles must know that it was sent.
                    self._settler.put(activity, Event.DEFER, sent_at, reason="no answer before the end")
                    raise
                # Whatever a given transport raises, KeyboardInterrupt too: one must not stop the others.
                reason = f"perqueue failed: {type(error).__name__}"
                outcome = Outcome(verdict=Verdict.NO_ANSWER, reason=reason)
            finally:
                self.in_flight -= 1
            self._answered(activity, outcome, sent_at)
            # A probe is chosen in a turn, not here: it may have to be looked for in the outbox.
            activity = self._next() if self._pace.gate is None else None
            sent_at = self._clock.monotonic()

    @staticmethod
    def _is_cancelled() -> bool:
        lane = asyncio.current_task()
        return lane is not None and lane.cancelling() > 0

    def _answered(self, activity: Activity, outcome: Outcome, sent_at: float) -> None:
        self._judge.judge(activity, outcome, sent_at)
        idle = not self.in_flight and not len(self._feed)
        if idle or len(self._settler) >= self._outbox.settle_batch or self._pace.gate is not None:
            self._settler.hurry()
        elif self._feed.hungry():
            self._event.set()
