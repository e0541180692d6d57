"""The thread ``perqueue-drain``: stands for election, drains when elected, and tells who waits.

Every process with an outbox open may have one; the one that holds the drain lock delivers. The lock is
the operating system's, so it ends with its process, however that ends.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from perqueue import _threads
from perqueue._complaints import Complaints, where
from perqueue._delivery.drain import OUTBOX, Drain
from perqueue._delivery.pace import Pace
from perqueue._loop import DaemonResolver, DeliveryLoop
from perqueue._stats import Gate
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._activity import Activity, Outcome
    from perqueue._clock import Clock
    from perqueue._delivery.settler import Observer
    from perqueue._outbox import DrainLock, Outbox
    from perqueue._settings import ClientSettings, RetryPolicy

log = logging.getLogger("perqueue")

ELECTION_INTERVAL = 1.0
"""Seconds between two tries for the drain lock: a dead drainer is replaced within two."""
_PRECEDENCE = 0.1
"""Seconds that another process has to take the lock itself when it asks for a probe: two of its tries."""

_abandoned: list[object] = []


def warm_up(settings: ClientSettings) -> None:
    """Import what the thread will need, and no more: httpx alone takes as long as all the rest.

    On the constructing thread: a child forked while another thread imports a module hangs when it
    imports the same one.
    """
    modules = ["encodings.idna", "filelock", "perqueue._wire.exchange"]
    if settings.proxy is not None or settings.transport is not None:
        modules += ["httpx", "httpcore", "anyio._backends._asyncio"]
    for module in modules:
        importlib.import_module(module)
    importlib.import_module("perqueue._wire.parser").new_parser()
    if settings.origin.startswith("https:") or settings.proxy is not None:
        importlib.import_module("certifi").where()  # imports what reads it


class Deliverer(Protocol):
    """Delivers activities: made on the worker's loop, closed on it."""

    async def deliver(self, activity: Activity) -> Outcome:
        """Send one and return what came of it."""

    async def aclose(self) -> None:
        """Close connections."""


class Worker:
    """One thread, started on demand, that drains or follows until it is stopped."""

    def __init__(
        self,
        outbox: Outbox,
        deliverer: Callable[[], Deliverer],
        observer: Observer,
        *,
        lock: Callable[[], DrainLock],
        looks_up_names: bool,
        drain: bool,
        policy: RetryPolicy,
        max_in_flight: int,
        request_timeout: float,
        keep_delivered_ms: int,
        clock: Clock,
    ) -> None:
        self._outbox = outbox
        self._deliverer = deliverer
        self._observer = observer
        self._new_lock = lock
        self._looks_up_names = looks_up_names
        self._drains = drain
        self._policy = policy
        self._max_in_flight = max_in_flight
        self._request_timeout = request_timeout
        self._keep_ms = keep_delivered_ms
        self._clock = clock
        self._reset()
        if drain:
            # Parked until the first record(), which may come when Python 3.12 starts no thread any more:
            # its main thread has ended, and others go on recording.
            with suppress(RuntimeError):
                self._make_thread()

    def abandon(self) -> None:
        """Be as new, in a forked child: the parent's thread, loop and sockets are not touched."""
        # Kept alive for good: a loop that is collected closes its epoll descriptor, which the child
        # shares with the parent, and a task that is collected complains.
        _abandoned.append((self._thread, self._loop, self._event, self._drain))
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._start_lock = _threads.RLock()  # a signal handler may record while its thread is in start()
        self._thread: _threads.Thread | None = None
        self._go: _threads.SimpleQueue[DrainLock | None] = _threads.SimpleQueue()
        self._trouble: str | None = None
        self._drain: Drain | None = None
        self._loop: DeliveryLoop | None = None
        self._event: asyncio.Event | None = None
        self._stopping = False
        self._grace = 0.0
        self._nudged = False
        self.pace = Pace(self._policy, self._max_in_flight, self._request_timeout, self._clock.monotonic)
        """When to send, and how much; kept from one term to the next."""
        self._complaints = Complaints(self._clock.monotonic)
        self._changes = -1
        self.started = False
        """Whether the thread was told to go."""
        self.standby = False
        """Whether another process holds the drain lock."""

    @property
    def in_flight(self) -> int:
        """Requests that are being waited for."""
        drain = self._drain
        return drain.in_flight if drain else 0

    @property
    def trouble(self) -> str | None:
        """Why this process can deliver nothing, if that is so."""
        drain = self._drain
        return drain.trouble if drain else self._trouble

    @property
    def thread(self) -> _threads.Thread | None:
        """The thread, if it was started."""
        return self._thread

    def start(self) -> None:
        """Let the thread go, unless it does; without effect while the interpreter shuts down."""
        with self._start_lock:
            if self.started or self._stopping:
                return
            try:
                self.started = True
                lock = self._new_lock()  # here: at exit, filelock chokes on one that a thread is just making
                if self._thread is None:
                    self._make_thread()
                self._go.put(lock)
            except BaseException as error:
                self.started = False
                if not isinstance(error, RuntimeError):
                    raise  # a signal handler's
                self._trouble = f"no thread can be started ({error}): the next start of the program delivers"
                if _threads.is_patched():  # not while the interpreter ends: that is silent
                    self._complain("thread", f"this process delivers nothing, and keeps everything: {error}")

    def _make_thread(self) -> None:
        _threads.check_event_loops()
        resolver = DaemonResolver() if self._looks_up_names else None
        self._go = _threads.SimpleQueue()  # its own: one that was given up must not take the next one's
        self._thread = _threads.new_thread(self._run, (resolver, self._go), name="perqueue-drain")
        try:
            self._thread.start()
        except BaseException:
            self._thread = None  # should it run after all, it ends at once
            self._go.put(None)
            if resolver is not None:
                resolver.close()
            raise

    def more(self) -> None:
        """There is a new activity. Called for every ``record()``."""
        drain = self._drain
        if drain is not None:
            drain.more()
        elif not self.started:
            self.start()

    def nudge(self) -> None:
        """Somebody waits: try now, or have the process try that drains."""
        self.start()
        self._nudged = True
        drain = self._drain
        if drain is not None:
            drain.probe(self._handled)
        else:
            self._ring()

    def _handled(self) -> None:
        self._nudged = False

    def stop(self, grace: float) -> None:
        """End the thread; requests in flight have ``grace`` seconds to be answered and settled."""
        if self._pid != os.getpid():
            return  # forked without hooks: the thread is another process's
        with self._start_lock:
            self._stopping = True
        self._grace = grace
        drain = self._drain
        if drain is not None:
            drain.stop(grace)
        self._go.put(None)
        self._ring()
        thread = self._thread
        if thread is not None and not _threads.is_current(thread):
            thread.join(timeout=grace + 3.0)

    def _ring(self) -> None:
        loop, event = self._loop, self._event
        if loop is not None and event is not None:
            with suppress(RuntimeError):  # closed between the look and the call
                loop.call_soon_threadsafe(event.set)

    # -- on the thread

    def _run(self, resolver: DaemonResolver | None, go: _threads.SimpleQueue[DrainLock | None]) -> None:
        lock = go.get()
        with self._start_lock:
            if lock is None or not _threads.is_current(self._thread) or self._stopping:
                if resolver is not None:
                    resolver.close()
                return
        loop = self._loop = DeliveryLoop(resolver)
        try:
            main = loop.create_task(self._main(lock))
            while not main.done():
                try:
                    loop.run_until_complete(main)
                # A KeyboardInterrupt in any task stops a loop, which can go on.
                except BaseException as error:  # noqa: BLE001
                    log.error("the drain's event loop has been interrupted, and goes on: %s", where(error))
        finally:
            self._drain = None
            if not self._stopping:
                self._trouble = "the drain has failed, see the log: restart the program"
            loop.close()

    async def _main(self, lock: DrainLock) -> None:
        self._event = asyncio.Event()
        deliverer = self._deliverer()
        try:
            while not self._stopping:
                try:
                    await self._term(deliverer, lock)
                except OutboxError as error:
                    self._complain(OUTBOX, f"the outbox cannot be used; trying again: {error}")
                    self._trouble = str(error) if self._drains else None
                    await self._rest(ELECTION_INTERVAL)
                except Exception as error:  # the drain outlives even its own mistakes
                    log.debug("the drain has failed", exc_info=True)
                    self._complain(
                        f"failure: {where(error)}",
                        "the drain has failed and starts again, everything is kept; please report this, it is"
                        f" logged once: {where(error)}",
                    )
                    await self._rest(ELECTION_INTERVAL)
        finally:
            self._drain = None
            await deliverer.aclose()
            with suppress(OSError):
                lock.release(force=True)

    async def _term(self, deliverer: Deliverer, lock: DrainLock) -> None:
        """Drain if elected; otherwise follow what the elected process does for a while."""
        paused = self.pace.gate is Gate.BAD_TOKEN and self.pace.wait() > 0 and not self._nudged
        if paused:
            self._trouble = None
        if not self._drains or paused or not self._elected(lock):
            await self._follow(self.pace.wait() if paused else ELECTION_INTERVAL)
            return
        try:
            drain = Drain(
                self._outbox,
                deliverer.deliver,
                self._observer,
                self.pace,
                self._complaints,
                policy=self._policy,
                keep_delivered_ms=self._keep_ms,
                clock=self._clock,
            )
            self._drain = drain
            if self._nudged:  # before there was a drain to ask; it probes after it took over a stored hold
                drain.probe(self._handled)
            if self._stopping:
                drain.stop(self._grace)
            await drain.run()
        finally:
            self._drain = None
            lock.release()

    def _elected(self, lock: DrainLock) -> bool:
        from filelock import Timeout

        try:
            lock.acquire()
        except Timeout:
            self.standby = True
            self._trouble = None
            return False
        except OSError as error:
            self._trouble = f"the drain lock cannot be taken, so this process delivers nothing: {error}"
            self._complain("lock", f"{self._trouble} (look at owner and mode of that file and its directory)")
            return False
        self.standby = False
        self._trouble = None
        lasted = self._complaints.over("lock")
        if lasted is not None:
            log.info("the drain lock can be taken again after %s", lasted)
        return True

    async def _follow(self, seconds: float) -> None:
        """Pass on what another process settles, until it is time for the next election."""
        until = self._clock.monotonic() + seconds
        paused = self._drains and not self.standby and self.pace.gate is Gate.BAD_TOKEN
        asked = self._outbox.news().probe_requests if paused else 0
        while not self._stopping:
            if paused and self._outbox.news().probe_requests != asked:
                await self._rest(_PRECEDENCE)  # somebody waits in another process, whose token may be good
                self._nudged = True
            if self._nudged and (self.standby or not self._drains):
                self._nudged = False
                self._outbox.request_probe()
            elif self._nudged:
                return
            awaited = self._observer.awaited()
            if awaited is not None:
                self._pass_on(awaited)
            self._observer.on_tick()
            left = until - self._clock.monotonic()
            if left <= 0:
                return
            watching = paused or awaited is not None
            await self._rest(min(left, self._outbox.follow_interval) if watching else left)
            if self.standby and awaited is not None:
                return  # the lock may be free by now

    def _pass_on(self, awaited: list[int]) -> None:
        changes = self._outbox.change_counter()
        if changes == self._changes and not awaited:
            return
        outcomes = self._outbox.settled(awaited)
        self._observer.on_settled(outcomes, [])
        hold = self._outbox.news().hold
        self._changes = changes  # only now: what raised is asked again
        if hold is not None:
            self._observer.on_hold(hold)

    def _complain(self, about: str, message: str) -> None:
        self._complaints.tell(about, logging.ERROR, message)

    async def _rest(self, seconds: float) -> None:
        assert self._event is not None  # noqa: S101 - for the type checker
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._event.wait()
        self._event.clear()
