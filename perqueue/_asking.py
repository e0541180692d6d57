"""Asking: the outbox what became of activities, Per for the usage, and both whether they agree."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from perqueue._lifetime import Lifetime

if TYPE_CHECKING:
    from datetime import datetime

    from perqueue._audit import ActivityRecord, Attempt
    from perqueue._clock import Clock
    from perqueue._reconcile import Reconciliation
    from perqueue._report import Report


class Asking(Lifetime):
    """The questions of :class:`perqueue.PerQueue`: none of them has to do with recording or delivering."""

    _clock: Clock

    def get_report(self, start: datetime | str | None = None, end: datetime | str | None = None) -> Report:
        """Ask Per for the usage report, now; see :meth:`perqueue.AsyncPerClient.get_report`.

        What is still pending is not in it: ``flush()`` first where that matters. Raises
        :class:`~perqueue.ConfigurationError` for dates or a missing token,
        :class:`~perqueue.AuthenticationError`, :class:`~perqueue.PerAPIError` for everything else that is
        no report, a timeout included, and :class:`~perqueue.QueueClosed`.
        """
        return self._reporter.get_report(start, end)

    async def aget_report(
        self, start: datetime | str | None = None, end: datetime | str | None = None
    ) -> Report:
        """Do as :meth:`get_report`, without blocking the event loop."""
        return await self._reporter.aget_report(start, end)

    def history(
        self,
        *,
        billing_id: str | None = None,
        user_id: str | None = None,
        activity_type_id: str | None = None,
        since: datetime | str | None = None,
        until: datetime | str | None = None,
        after: int = 0,
        limit: int | None = 10_000,
    ) -> list[ActivityRecord]:
        """Return activities and what became of them, in the order of recording.

        All filters are optional, and several must all fit. ``since`` (included) and ``until`` (not included)
        are about ``recorded_at``, as aware datetimes or ISO 8601 strings with a time zone; they are found
        without reading what lies outside, and exact unless the clock was set back by more than a day. At
        most ``limit`` records are returned (None: all); go on with ``after=records[-1].id``. Settled
        activities are kept for ``keep_delivered``.

        Reads in short steps beside ``record()``, which does not wait for it. Without a time it reads the
        whole outbox if it must: seconds for millions. Raises :class:`~perqueue.ConfigurationError`,
        :class:`~perqueue.OutboxError` or :class:`~perqueue.QueueClosed`.
        """
        if self._closed:
            self._refuse()
        from perqueue._audit import history

        return history(
            self._settings.outbox,
            billing_id=billing_id,
            user_id=user_id,
            activity_type_id=activity_type_id,
            since=since,
            until=until,
            after=after,
            limit=limit,
        )

    def attempts(self, activity_id: int) -> list[Attempt]:
        """Return every request for one activity of :meth:`history`, oldest first.

        The one that Per accepted is the last, and the only one without a ``reason``. Empty for one that was
        never sent, or is not there (any more). Raises as :meth:`history`.
        """
        if self._closed:
            self._refuse()
        from perqueue._audit import attempts

        return attempts(self._settings.outbox, activity_id)

    def reconcile(
        self,
        start: datetime | str | None = None,
        end: datetime | str | None = None,
        *,
        tolerance: timedelta = timedelta(0),
    ) -> Reconciliation:
        """Ask Per for its report of a period, and explain it by the audit trail.

        Dates as for :meth:`get_report`: none is the whole prior calendar month. For each activity type and
        billing ID there is a :class:`~perqueue.ReconciliationRow` with Per's number beside what was
        recorded and delivered here, and a verdict. Best asked for a period that is over. ``tolerance`` is
        how far Per's clock may differ from this machine's: what happened so near to a boundary may count on
        either side of it.

        Reads all that is kept up to the end of the period, in short steps: minutes for tens of millions, in
        the calling thread. Raises what :meth:`get_report` raises, and :class:`~perqueue.OutboxError`.
        """
        if self._closed:
            self._refuse()
        from perqueue._reconcile import reconcile

        return reconcile(self._settings.outbox, self._reporter.get_report, start, end, self._clock, tolerance)

    async def areconcile(
        self,
        start: datetime | str | None = None,
        end: datetime | str | None = None,
        *,
        tolerance: timedelta = timedelta(0),
    ) -> Reconciliation:
        """Do as :meth:`reconcile`, in a thread, without blocking the event loop."""
        import asyncio

        return await asyncio.to_thread(self.reconcile, start, end, tolerance=tolerance)
