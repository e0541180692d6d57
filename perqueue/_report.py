"""Per's usage report, and the form of the dates that ask for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from perqueue.exceptions import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """Usage of one billing ID with one activity type."""

    activity_type_id: str
    billing_id: str
    unique: int
    """Number of distinct user IDs in the period."""


@dataclass(frozen=True, slots=True)
class Report:
    """Per's answer to ``reports.get``: unique users for each activity type and billing ID."""

    raw: dict[str, Any]
    """The answer's ``result``, as Per sent it."""
    activity_type_id: str | None = None
    """The type that :meth:`unique` takes when none is named: the queue's own."""
    _rows: tuple[ReportRow, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rows = []
        for kind, content in (self.raw.get("activityTypes") or {}).items():
            for billing_id, usage in (content.get("billingIds") or {}).items():
                unique = usage["unique"]
                if not isinstance(unique, int) or isinstance(unique, bool) or unique < 0:
                    message = "a number of unique users is not a whole number"
                    raise ValueError(message)
                rows.append(ReportRow(activity_type_id=kind, billing_id=billing_id, unique=unique))
        object.__setattr__(self, "_rows", tuple(rows))

    @property
    def start(self) -> datetime | None:
        """Beginning of the period, as Per gives it."""
        return _parsed(self.raw.get("start"))

    @property
    def end(self) -> datetime | None:
        """End of the period, as Per gives it; None when it is open."""
        return _parsed(self.raw.get("end"))

    def rows(self) -> list[ReportRow]:
        """Return one row for each activity type and billing ID, in Per's order."""
        return list(self._rows)

    def unique(self, billing_id: str, activity_type_id: str | None = None) -> int:
        """Return how many distinct users of a billing ID were active; 0 if Per lists none.

        Without ``activity_type_id``: the queue's own type, else the only one in the report. Raises
        :class:`~perqueue.ConfigurationError` if there are several, because unique users of several
        types cannot be added up.
        """
        kind = activity_type_id or self.activity_type_id
        if kind is None:
            kinds = {row.activity_type_id for row in self._rows}
            if len(kinds) > 1:
                message = f"the report has {len(kinds)} activity types: name the one that is meant"
                raise ConfigurationError(message)
            kind = next(iter(kinds), None)
        return sum(r.unique for r in self._rows if r.billing_id == billing_id and r.activity_type_id == kind)


def _parsed(text: object) -> datetime | None:
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def report_period(start: datetime | str | None, end: datetime | str | None) -> dict[str, str]:
    """Return the query parameters of a period, or raise :class:`~perqueue.ConfigurationError`.

    ``start`` is required if ``end`` is given (Per's documentation, "Reporting").
    """
    first, last = checked_moment("start", start), checked_moment("end", end)
    if first is None and last is not None:
        message = "a report with an end needs a start"
        raise ConfigurationError(message)
    if first is not None and last is not None and first > last:
        message = "the report's start lies after its end"
        raise ConfigurationError(message)
    period = {"start": first, "end": last}
    return {name: _timestamp(moment) for name, moment in period.items() if moment is not None}


def checked_moment(name: str, value: datetime | str | None) -> datetime | None:
    """Return a moment in UTC, or raise :class:`~perqueue.ConfigurationError`."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            message = f"{name} is not an ISO 8601 date like 2018-12-01T00:00:00Z"
            raise ConfigurationError(message) from None
    if not isinstance(value, datetime):
        message = f"{name} must be an aware datetime or an ISO 8601 string, not {type(value).__name__}"
        raise ConfigurationError(message)
    if value.utcoffset() is None:
        message = f"{name} needs a time zone: 2018-12-01T00:00:00Z, or datetime(…, tzinfo=UTC)"
        raise ConfigurationError(message)
    try:
        return value.astimezone(UTC)
    except OverflowError:
        message = f"{name} lies beyond the calendar once it is in UTC"
        raise ConfigurationError(message) from None


def _timestamp(moment: datetime) -> str:
    """Format as Per documents it, with milliseconds only where they say something."""
    precision = "milliseconds" if moment.microsecond >= 1000 else "seconds"
    return moment.isoformat(timespec=precision).replace("+00:00", "Z")
