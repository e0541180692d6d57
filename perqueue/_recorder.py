"""``PerQueue``: the façade, and the one place where the parts are put together."""

from __future__ import annotations

import logging
import sys
import weakref
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Literal, NoReturn

from perqueue import _ending, _fork, _threads
from perqueue._activity import Activity, checked_id
from perqueue._asking import Asking
from perqueue._client import Reporter
from perqueue._clock import SYSTEM_CLOCK
from perqueue._flush import Told
from perqueue._joining import Entry, ajoin, explain_lock, join
from perqueue._observer import Observer
from perqueue._outbox import open_outbox
from perqueue._receipt import Receipt
from perqueue._settings import is_address, resolve_settings
from perqueue._stats import DrainState
from perqueue._status import describe
from perqueue.exceptions import (
    InvalidActivity,
    OutboxError,
    PerQueueError,
)

if TYPE_CHECKING:
    import os
    import ssl
    from collections.abc import Callable
    from datetime import timedelta

    import httpx
    from opentelemetry.metrics import MeterProvider

    from perqueue._coalescer import Coalescer
    from perqueue._delivery.worker import Worker
    from perqueue._instruments import Reading, Where
    from perqueue._measures import Measures
    from perqueue._settings import RetryPolicy, Token
    from perqueue._stats import Stats

log = logging.getLogger("perqueue")

_JOINED = (
    "this activity is part of a transaction of the application's own, of whose end perqueue is not told, and"
    " its number is given again if that is rolled back: after the commit, flush() waits for it"
)


class PerQueue(Asking):
    """Records billable activity for Per in a local outbox, and delivers it in the background.

    ``record()`` commits to a SQLite file and returns; a daemon thread delivers, for as long as it takes;
    ``flush()`` means "Per has it". One object for each process and outbox is meant to be shared by all
    threads and event loops. It survives ``os.fork()``, and cannot be pickled.

    :param outbox: path of a SQLite file of its own, created if missing with mode 0600
        (``PERQUEUE_OUTBOX``). Refused: on a network file system, another user's, and a symbolic link in a
        directory that everybody may write.
    :param activity_token: Per's token with the scope *activity*, or a callable that returns it
        (``PER_ACTIVITY_TOKEN``). Required unless ``drain=False``. A callable is asked for every request,
        on a thread of its own and within ``request_timeout``: let it cache.
    :param activity_type_id: what ``record()`` records unless told otherwise (``PER_ACTIVITY_TYPE_ID``,
        else ``ACTIVITY_TYPE_ID``).
    :param reporting_token: Per's token with the scope *reporting*, or a callable
        (``PER_REPORTING_TOKEN``).
    :param base_url: where Per is (``PER_BASE_URL``); plain http only on loopback. An outbox belongs to
        the origin it was made for.
    :param embedded: True: the outbox is in tables of its own (``perqueue_...``) inside the application's
        SQLite file, which must be there and otherwise stays as it is; then ``record(connection=...)`` can be
        part of the application's own transactions.
    :param coalesce: a ``timedelta`` that divides 24 hours, at most ``keep_delivered``: at most one delivery
        for each (billing ID, user ID, activity type) in each window of that length, counted from midnight
        UTC. The others get the receipt of the first. Per reports unique users, so that reports aligned to
        the windows do not change.
    :param drain: False only records: some other process (``perqueue drain``) delivers
        (``PERQUEUE_DRAIN``).
    :param max_in_flight: most requests at a time, 1 to 1024.
    :param durability: "process" survives ``kill -9`` from the moment ``record()`` returns, and a power
        cut about 0.1 s later; "power" survives a power cut from that moment, for one fsync, which
        concurrent callers share.
    :param keep_delivered: how long settled activities stay as the audit trail, at least one hour
        (default: 35 days).
    :param max_pending: ``record()`` raises :class:`~perqueue.OutboxFull` beyond.
    :param flush_timeout: seconds, for ``flush()`` and ``with``; None waits without limit.
    :param exit_timeout: seconds to deliver at interpreter exit without ``close()``, and for requests in
        flight at ``close()``.
    :param request_timeout: seconds for one request as a whole.
    :param retry: backoff, see :class:`~perqueue.RetryPolicy`.
    :param proxy: given to httpx; nothing is taken from the environment.
    :param verify: given to httpx: True, or an ``ssl.SSLContext``.
    :param transport: an ``httpx.AsyncBaseTransport`` to use instead of the network, from several event
        loops. An ``httpx.AsyncHTTPTransport`` serves as a pattern: its settings are used, its connections
        are not.
    :param on_record_error: called with the :class:`~perqueue.OutboxError` instead of raising it.
    :param on_rejected: called with each :class:`~perqueue.Activity` that Per refuses, from the drain's
        thread: it must be quick.
    :param on_stalled: called with :class:`~perqueue.Stats`, once, when the oldest pending activity is
        older than ``stalled_after``.
    :param stalled_after: seconds (default: 300).
    :param meter_provider: an ``opentelemetry.metrics.MeterProvider`` to report metrics through. Default:
        OpenTelemetry's global one, if the program has loaded OpenTelemetry's metrics by now; else there are
        none. A ``NoOpMeterProvider`` turns them off. What there is: ``docs/observability.md``.

    Raises :class:`~perqueue.ConfigurationError` for an option, and :class:`~perqueue.OutboxError` for the
    file.
    """

    def __init__(
        self,
        outbox: str | os.PathLike[str] | None = None,
        *,
        activity_token: Token | None = None,
        activity_type_id: str | None = None,
        reporting_token: Token | None = None,
        base_url: str | None = None,
        drain: bool | None = None,
        embedded: bool = False,
        max_in_flight: int = 32,
        durability: Literal["process", "power"] = "process",
        coalesce: timedelta | None = None,
        keep_delivered: timedelta | None = None,
        max_pending: int = 10_000_000,
        flush_timeout: float | None = 30.0,
        exit_timeout: float = 2.0,
        request_timeout: float = 10.0,
        retry: RetryPolicy | None = None,
        proxy: httpx.Proxy | httpx.URL | str | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        on_record_error: Callable[[OutboxError], object] | None = None,
        on_rejected: Callable[[Activity], object] | None = None,
        on_stalled: Callable[[Stats], object] | None = None,
        stalled_after: float = 300.0,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        self._closed = True  # until everything below has worked
        self._settings = settings = resolve_settings(
            outbox=outbox,
            activity_token=activity_token,
            activity_type_id=activity_type_id,
            reporting_token=reporting_token,
            base_url=base_url,
            drain=drain,
            embedded=embedded,
            max_in_flight=max_in_flight,
            durability=durability,
            coalesce=coalesce,
            keep_delivered=keep_delivered,
            max_pending=max_pending,
            flush_timeout=flush_timeout,
            exit_timeout=exit_timeout,
            request_timeout=request_timeout,
            retry=retry,
            proxy=proxy,
            verify=verify,
            transport=transport,
            on_record_error=on_record_error,
            on_rejected=on_rejected,
            on_stalled=on_stalled,
            stalled_after=stalled_after,
            meter_provider=meter_provider,
        )
        self._clock = SYSTEM_CLOCK
        self._activity_type_id = settings.activity_type_id
        self._self = weakref.ref(self)
        self._committed = _weak_more(self._self)
        self._close_lock = _threads.RLock()
        self._reporter = Reporter(settings)
        self._worker: Worker | None = None
        if settings.drain:
            from perqueue._delivery.worker import warm_up

            warm_up(settings)
        self._outbox = open_outbox(
            settings.outbox,
            settings.origin,
            embedded=settings.embedded,
            power=settings.durability == "power",
            max_pending=settings.max_pending,
        )
        self._coalescer: Coalescer | None = None
        if settings.coalesce is not None:
            from perqueue._coalescer import Coalescer

            self._coalescer = Coalescer(settings.coalesce, self._outbox)
        self._observer = Observer(settings, _weak_stats(self._self), self._coalescer)
        try:
            position = self._outbox.position()
        except BaseException:
            self._outbox.close()
            raise
        self._opened_at = position
        self._told = Told(position, self._outbox.epoch)
        self._measures: Measures | None = None
        if settings.meter_provider is not None or "opentelemetry.metrics" in sys.modules:
            from perqueue import _metrics

            self._measures = _metrics.report(self, self._where(), settings.meter_provider)
        self._finalizer = self._end_when_dropped(None)
        self._closed = False
        if settings.drain or settings.on_stalled is not None:  # who only records may look if others deliver
            self._make_worker()
            if position.pending > 0:
                self._follower().start()
        _fork.participate(self)
        _ending.opened(self)

    def __repr__(self) -> str:
        return f"<PerQueue {self._settings.outbox} for {self._settings.origin}>"

    def __reduce__(self) -> NoReturn:
        message = "a PerQueue cannot be pickled: make one in each process, with the same outbox"
        raise TypeError(message)

    # -- recording

    def record(  # noqa: C901 - the hot path is written out
        self,
        billing_id: str,
        user_id: str,
        *,
        activity_type_id: str | None = None,
        connection: object | None = None,
    ) -> Receipt:
        """Commit one activity to the outbox, and return a receipt that need not be kept.

        Each ID is a non-empty ``str`` of at most 400 UTF-8 bytes without NUL. When this returns, the
        activity is stored. Raises :class:`~perqueue.InvalidActivity` or :class:`~perqueue.OutboxFull`
        (nothing was stored), :class:`~perqueue.OutboxError` (possibly stored: record it again) or
        :class:`~perqueue.QueueClosed`. Microseconds as a rule; at most about a second if the file is locked.

        With ``connection``, where the outbox is in the application's own database, the activity becomes part
        of the transaction that is open there: it exists, and is delivered, exactly if that is committed.
        It is a ``sqlite3.Connection``, SQLAlchemy's ``Session`` or ``Connection``, or Django's; in autocommit
        mode, without a transaction, it commits at once. The receipt has an ``id`` (which means nothing if the
        transaction is rolled back) and cannot be waited for. Raises :class:`~perqueue.ConfigurationError` for
        a connection that cannot be used, and :class:`~perqueue.OutboxError` always, whatever
        ``on_record_error`` says: roll back then. It waits as long for locks as that connection does.
        """
        if connection is not None:
            return self._joined(join(connection, self._entry(billing_id, user_id, activity_type_id)))
        measures = self._measures
        began = 0.0 if measures is None else perf_counter()
        kind = self._activity_type_id if activity_type_id is None else activity_type_id
        if kind is None:
            self._no_type()
        coalescer = self._coalescer
        if coalescer is not None and not self._closed:
            with suppress(TypeError):  # an ID that is no str is told below
                standing = coalescer.standing((billing_id, user_id, kind), self._clock.time_ms())
                if standing is not None:
                    return Receipt(standing, self._self, None, self._outbox.epoch)
        billing_id = checked_id("billing_id", billing_id)
        user_id = checked_id("user_id", user_id)
        if activity_type_id is not None:
            kind = checked_id("activity_type_id", kind)
        if self._closed:
            self._refuse()
        recorded_at = self._clock.time_ms()
        try:
            if coalescer is None:
                activity_id = self._outbox.append(billing_id, user_id, kind, recorded_at)
            else:
                activity_id = coalescer.record((billing_id, user_id, kind), recorded_at)
        except OutboxError as error:
            if self._closed:
                self._refuse()
            error.activity = Activity(
                id=0, billing_id=billing_id, user_id=user_id, activity_type_id=kind, recorded_at=recorded_at
            )
            return self._not_recorded(error)
        worker = self._worker
        if worker is not None:
            worker.more()
        if measures is not None:
            measures.recorded.add(perf_counter() - began)
        return Receipt(activity_id, self._self, None, self._outbox.epoch)

    async def arecord(
        self,
        billing_id: str,
        user_id: str,
        *,
        activity_type_id: str | None = None,
        connection: object | None = None,
    ) -> Receipt:
        """Do as :meth:`record`, without blocking the event loop.

        ``connection`` is SQLAlchemy's ``AsyncSession`` or ``AsyncConnection``, or an
        ``aiosqlite.Connection``. Without one this waits in a thread for the disk and for locks: where the
        outbox is in the application's own database, another coroutine's transaction may hold one, and
        ``record()`` would keep that from going on.
        """
        if connection is None:
            import asyncio

            return await asyncio.to_thread(
                self.record, billing_id, user_id, activity_type_id=activity_type_id
            )
        return self._joined(await ajoin(connection, self._entry(billing_id, user_id, activity_type_id)))

    def _entry(self, billing_id: str, user_id: str, activity_type_id: str | None) -> Entry:
        kind = self._activity_type_id if activity_type_id is None else activity_type_id
        if kind is None:
            self._no_type()
        key = (
            checked_id("billing_id", billing_id),
            checked_id("user_id", user_id),
            checked_id("activity_type_id", kind),
        )
        if self._closed:
            self._refuse()
        now = self._clock.time_ms()
        window = None if self._coalescer is None else self._coalescer.window(now)
        return Entry(self._outbox, key, window, now, self._committed)

    def _joined(self, activity_id: int) -> Receipt:
        if self._worker is not None:
            self._worker.start()  # of the commit it may have to hear by itself
        return Receipt(activity_id, self._self, PerQueueError(_JOINED))

    def _no_type(self) -> NoReturn:
        message = "activity_type_id is missing: pass it here or to PerQueue, or set PER_ACTIVITY_TYPE_ID"
        raise InvalidActivity(message)

    def _not_recorded(self, error: OutboxError) -> Receipt:
        if self._measures is not None:
            self._measures.not_recorded[type(error).__name__] += 1
        if self._settings.embedded:
            explain_lock(error)
        if self._settings.on_record_error is None:
            raise error
        self._observer.call_back("on_record_error", error)
        return Receipt(0, self._self, error)

    # -- parts that are made when needed

    def _follower(self) -> Worker:
        """Return the worker; a queue that does not drain has one only to hear what others settle."""
        with self._close_lock:  # several that begin to wait at once share it, and a closed queue gets none
            if self._closed:
                self._refuse()
            return self._worker or self._make_worker()

    def _make_worker(self) -> Worker:
        from perqueue._delivery.worker import Worker
        from perqueue._measures import MeasuredDeliverer
        from perqueue._wire.exchange import Wire  # loads asyncio

        settings, measures = self._settings, self._measures
        worker = Worker(
            self._outbox,
            (lambda: Wire(settings))
            if measures is None
            else lambda: MeasuredDeliverer(Wire(settings), measures),
            self._observer,
            lock=self._outbox.drain_lock,
            looks_up_names=settings.transport is None and not is_address(settings.base_url),
            drain=settings.drain,
            policy=settings.retry,
            max_in_flight=settings.max_in_flight,
            request_timeout=settings.request_timeout,
            keep_delivered_ms=int(settings.keep_delivered.total_seconds() * 1000),
            clock=self._clock,
        )
        if self._worker is None:  # else a signal handler, which waits, has made one meanwhile
            self._finalizer.detach()
            self._finalizer = self._end_when_dropped(worker)
            self._worker = worker
        return self._worker

    def _end_when_dropped(self, worker: Worker | None) -> weakref.finalize[..., PerQueue]:
        finalizer = weakref.finalize(self, _ending.end_elsewhere, self._outbox, worker, self._reporter)
        finalizer.atexit = False  # the end of the interpreter is announced: deliver_at_exit()
        return finalizer

    # -- asking

    def stats(self) -> Stats:
        """Return counts and what the drain is doing; microseconds, however large the outbox.

        Raises :class:`~perqueue.OutboxError` or, after ``close()``, :class:`~perqueue.QueueClosed`.
        """
        if self._closed:
            self._refuse()
        return describe(
            self._outbox.position(), self._worker, drains=self._settings.drain, now=self._clock.time_ms()
        )

    def _reading(self) -> Reading:
        """See :class:`perqueue._metrics.Reported`."""
        from perqueue._instruments import Reading  # loaded: metrics ask

        if self._closed:
            self._refuse()
        position, worker = self._outbox.position(), self._worker
        stats = describe(position, worker, drains=self._settings.drain, now=self._clock.time_ms())
        state = stats.state
        if worker is None or not worker.trouble:
            if worker is None or not worker.started or not self._settings.drain:
                state = DrainState.OFF
            elif worker.standby:
                state = DrainState.STANDBY
        return Reading(where=self._where(), position=position, stats=stats, state=state)

    def _where(self) -> Where:
        from perqueue._instruments import Where

        return Where(self._settings.outbox, self._outbox.outbox_id)


def _weak_more(reference: weakref.ref[PerQueue]) -> Callable[..., None]:
    def more(*_: object) -> None:
        queue = reference()
        if queue is not None and queue._worker is not None:  # noqa: SLF001
            queue._worker.more()  # noqa: SLF001

    return more


def _weak_stats(reference: weakref.ref[PerQueue]) -> Callable[[], Stats | None]:
    def stats() -> Stats | None:
        queue = reference()
        try:
            return queue.stats() if queue is not None else None
        except PerQueueError:
            return None

    return stats
