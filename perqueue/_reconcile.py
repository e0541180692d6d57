"""Per's report beside the audit trail: :meth:`perqueue.PerQueue.reconcile`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

from perqueue._clock import datetime_from_ms, ms_from_datetime
from perqueue._outbox import open_trail
from perqueue._report import checked_moment
from perqueue.exceptions import ConfigurationError, PerAPIError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue._clock import Clock
    from perqueue._outbox.tally import Count, Notebook, Period, Tally
    from perqueue._report import Report

    GetReport = Callable[[datetime | str | None, datetime | str | None], Report]

_MOST_TOLERANCE = timedelta(days=1)
_PAUSES = (0.1, 0.4, 0.0)
"""Seconds to wait for answers that are on their way, before they are missed."""
_UNDER_WAY_MS = 60_000
VerdictName = Literal["match", "explained", "unexplained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconciliationRow:
    """One activity type and billing ID of a period. All numbers count unique users."""

    activity_type_id: str
    billing_id: str
    per_unique: int
    """What Per's report says."""
    delivered_unique: int
    """Users of whom Per accepted an activity in the period, by the time of its answer."""
    recorded_unique: int
    """Users of whom an activity was recorded in the period."""
    late: int
    """Users with an activity that was recorded before the start or the end, and sent after it: Per dates an
    activity by its arrival. Of a period that is not over, nothing is late at its end."""
    uncertain: int
    """Users with an activity that was sent before the start or the end, and answered after it: it arrived in
    between."""
    pending: int
    """Users with an activity recorded in the period that Per has not answered yet; of a period that is not
    over, that it had not been sent when the report was made."""
    rejected: int
    """Users with an activity recorded in the period that Per refused; discarded and requeued ones count by
    what they are now."""
    verdict: VerdictName
    """``match``: Per, delivered and recorded are equal, and the same users. ``explained``: they differ, and
    the trail says why.
    ``unexplained``: Per's number cannot come from this outbox alone."""
    note: str = ""
    """The explanation, or what is missing for one, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation(Sequence[ReconciliationRow]):
    """Per's report of a period beside what the outbox knows of it: a sequence of rows."""

    start: datetime
    end: datetime | None
    """As Per was asked, both included to the millisecond; None: until now."""
    complete: bool
    """False if activities settled in the period may have been deleted (``keep_delivered``), or were lost with
    a damaged file: then nothing is called a match."""
    damaged: int
    """Activities that are not counted, because their rows are damaged."""
    _rows: tuple[ReconciliationRow, ...] = field(repr=False)

    def rows(self) -> list[ReconciliationRow]:
        """Return the rows, by activity type and billing ID."""
        return list(self._rows)

    @property
    def unexplained(self) -> list[ReconciliationRow]:
        """The rows that somebody has to look into."""
        return [row for row in self._rows if row.verdict == "unexplained"]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> ReconciliationRow: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ReconciliationRow, ...]: ...
    def __getitem__(self, index: int | slice) -> ReconciliationRow | tuple[ReconciliationRow, ...]:
        return self._rows[index]


def reconcile(  # noqa: PLR0917 - as they come from the queue
    place: Path | DatabaseURL,
    get_report: GetReport,
    start: datetime | str | None,
    end: datetime | str | None,
    clock: Clock,
    tolerance: timedelta = timedelta(0),
    *,
    notebook: Notebook | None = None,
) -> Reconciliation:
    """See :meth:`perqueue.PerQueue.reconcile`; ``notebook`` notes each activity worth a look."""
    from perqueue._outbox.tally import tally

    if not (isinstance(tolerance, timedelta) and timedelta(0) <= tolerance <= _MOST_TOLERANCE):
        message = "tolerance must be a timedelta from 0 to a day"
        raise ConfigurationError(message)
    asked = clock.time_ms()
    report = get_report(start, end)
    period = _period(report, start, end, (asked, clock.time_ms()))
    period = period._replace(tolerance=tolerance // timedelta(milliseconds=1))
    said = {(row.activity_type_id, row.billing_id): row.unique for row in report.rows()}
    with open_trail(place) as trail:
        for pause in _PAUSES:
            known = tally(trail, period, notebook)
            if not pause or not _may_be_answered(said, known, asked - period.end):
                break
            time.sleep(pause)
    lost = known.lost_through > 0 and known.lost_through >= period.start - period.tolerance - 1
    circumstances = _Circumstances(complete=not (lost or known.damaged), is_over=period.is_over)
    counted = {(count.activity_type_id, count.billing_id): count for count in known.counts}
    rows = [
        _row(key, said.get(key, 0), counted.get(key), circumstances)
        for key in sorted(said.keys() | counted.keys())
    ]
    return Reconciliation(
        start=datetime_from_ms(period.start),
        end=_end(report, start, end),
        complete=circumstances.complete,
        damaged=known.damaged,
        _rows=tuple(rows),
    )


def _may_be_answered(said: Mapping[tuple[str, str], int], known: Tally, age: int) -> bool:
    """Tell whether Per may have counted requests whose answers are only just being written down.

    ``age`` says how long ago the period ended, in milliseconds.
    """
    return age < _UNDER_WAY_MS and any(
        count.pending and said.get((count.activity_type_id, count.billing_id), 0) > count.most
        for count in known.counts
    )


def _end(report: Report, start: datetime | str | None, end: datetime | str | None) -> datetime | None:
    return report.end if start is None else checked_moment("end", end)


def _period(
    report: Report, start: datetime | str | None, end: datetime | str | None, asked: tuple[int, int]
) -> Period:
    """Return the period as it can be compared: a report has nothing of what came after it was made."""
    from perqueue._outbox.tally import Period

    first, last = report.start if start is None else checked_moment("start", start), _end(report, start, end)
    if first is None or first.tzinfo is None or (last is not None and last.tzinfo is None):
        message = "the report does not say which period it is of: name one"
        raise PerAPIError(message)
    if last is None:
        return Period(ms_from_datetime(first), *asked, is_over=False)
    ends = ms_from_datetime(last)
    before, after = (min(ends, moment) for moment in asked)
    return Period(ms_from_datetime(first), before, after, is_over=ends < asked[0])


class _Circumstances(NamedTuple):
    """What is true of every row."""

    complete: bool
    is_over: bool


def _row(
    key: tuple[str, str], per: int, count: Count | None, circumstances: _Circumstances
) -> ReconciliationRow:
    if count is None:
        from perqueue._outbox.tally import Count

        count = Count(*key)
    # Equal numbers of different users are no match: somebody was late, and somebody else took the place.
    agree = per == count.delivered == count.recorded == count.both
    possible = count.least <= per <= count.most
    verdict: VerdictName = "explained" if possible else "unexplained"
    if agree and circumstances.complete:
        verdict = "match"
    notes = [] if agree else list(_reasons(per, count, circumstances))
    if not possible:
        notes.append(_riddle(per, count, complete=circumstances.complete))
        if count.pending and not circumstances.is_over:
            notes.append("the period is not over: what is on its way may be counted already")
    elif not (agree or notes):
        notes.append("the clock of this machine was set back")
    if not circumstances.complete:
        notes.append("trail incomplete")
    return ReconciliationRow(
        activity_type_id=count.activity_type_id,
        billing_id=count.billing_id,
        per_unique=per,
        delivered_unique=count.delivered,
        recorded_unique=count.recorded,
        late=count.late,
        uncertain=count.uncertain,
        pending=count.pending,
        rejected=count.rejected,
        verdict=verdict,
        note="; ".join(notes),
    )


def _reasons(per: int, count: Count, circumstances: _Circumstances) -> Iterator[str]:
    """Yield what makes the numbers differ."""
    if count.late:
        yield f"{count.late} late: recorded before a boundary of the period, sent after it"
    if count.uncertain:
        when = "at a boundary of the period" if circumstances.is_over else "when the report was made"
        yield f"{count.uncertain} uncertain: on the way to Per {when}"
    if count.pending:
        yield f"{count.pending} pending"
    if count.rejected:
        yield f"{count.rejected} rejected"
    if count.unanswered and count.delivered < per <= count.most:
        yield f"{count.unanswered} with a request that Per did not answer, and may have counted"
    if count.at_the_edge and per != count.delivered and count.least <= per <= count.most:
        yield f"{count.at_the_edge} so near to a boundary that the clocks decide on which side"


def _riddle(per: int, count: Count, *, complete: bool) -> str:
    if per > count.most and not complete:
        return f"Per counts {per - count.most} more than the rest of the trail can account for"
    if per > count.most:
        text = f"Per counts {per - count.most} more than is known to be sent from this outbox:"
        text += " something else feeds the same account"
        # Of a request that was under way then, nobody was left to write anything down.
        return f"{text}, or a process was killed while it sent" if count.late or count.pending else text
    return (
        f"Per counts {count.least - per} fewer than it accepted from here:"
        " its clock differs, or `perqueue history` has the transaction IDs to ask about"
    )
