"""What a report has found: Per's numbers, the series, and the outbox's account of them."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING

from perqueue._clock import datetime_from_ms, ms_from_datetime
from perqueue._outbox import open_trail
from perqueue.cli import _print

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from perqueue._address import DatabaseURL
    from perqueue._outbox import Traced
    from perqueue._reconcile import Reconciliation
    from perqueue._report import Report
    from perqueue.cli._series import By, Step

LISTED = 100
"""Single activities that are listed of each kind."""

Key = tuple[str, str]
"""Activity type and billing ID."""


class Noted:
    """The activities that are late, uncertain, pending or rejected: how many, and the first of each."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget all."""
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Traced]] = {}
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._oldest: dict[Key, int] = {}

    def note(self, activity_id: int, key: Key, recorded_at: int, kind: str) -> None:
        """Take note of an activity."""
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self._numbers[kind].append(activity_id)
        self._oldest.setdefault(key, recorded_at)

    def look_up(self, outbox: Path | DatabaseURL) -> None:
        """Read the first of each kind; what was deleted meanwhile is left out."""
        with open_trail(outbox) as trail:
            for kind, numbers in self._numbers.items():
                found = (trail.trace_one(number) for number in numbers)
                self.first[kind] = [one[0] for one in found if one is not None]

    def since(self, key: Key, start: datetime) -> datetime:
        """Return from when on to read the history of what counts in a period that starts then."""
        oldest = self._oldest.get(key)
        return start if oldest is None else min(start, datetime_from_ms(oldest))


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All that one run of the command has found out."""

    origin: str
    """Whom it was asked of."""
    asked_at: datetime
    usage: Report
    start: datetime | None
    """First moment; None if Per did not say."""
    end: datetime | None
    """Last moment, included; None: until it was asked."""
    by: By | None = None
    steps: Sequence[Step] = ()
    outbox: Path | DatabaseURL | None = None
    reconciliation: Reconciliation | None = None
    noted: Noted

    @property
    def is_over(self) -> bool:
        """Whether the numbers cannot grow any more."""
        return self.end is not None and self.end < self.asked_at

    @property
    def failed(self) -> list[Step]:
        """The steps of which Per said nothing."""
        return [step for step in self.steps if step.usage is None]

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return unique users and billing IDs of each activity type, most users first.

        Users of several billing IDs can be added up: a user ID means something within its billing ID only.
        """
        groups = Counter(row.activity_type_id for row in self.usage.rows())
        return {kind: (count, groups[kind]) for kind, count in _users(self.usage).most_common()}

    def series(self) -> dict[str, list[int | None]]:
        """Return unique users of each activity type, step by step; None where Per said nothing."""
        steps = [None if step.usage is None else _users(step.usage) for step in self.steps]
        kinds = dict.fromkeys([*self.totals(), *(kind for step in steps for kind in step or ())])
        return {kind: [None if step is None else step[kind] for step in steps] for kind in kinds}

    def ranked(self, activity_type_id: str, most: int) -> list[tuple[str, int]]:
        """Return the billing IDs of a type that have most users, with their numbers."""
        found = [
            (r.billing_id, r.unique) for r in self.usage.rows() if r.activity_type_id == activity_type_id
        ]
        return list(islice(sorted(found, key=lambda pair: (-pair[1], pair[0])), most))

    def counted(self) -> list[dict[Key, int] | None]:
        """Return each step's numbers; None for one of which Per said nothing."""
        return [
            None
            if step.usage is None
            else {(row.activity_type_id, row.billing_id): row.unique for row in step.usage.rows()}
            for step in self.steps
        ]

    def command(self, key: Key) -> list[str]:
        """Return the words of the command that shows the single activities behind a number."""
        assert self.start is not None  # noqa: S101 - a reconciliation has one
        words = ["perqueue", "history", "--outbox", quoted(str(self.outbox))]
        words += ["--billing", quoted(key[1]), "--activity-type", quoted(key[0])]
        words += ["--since", _date(self.noted.since(key, self.start))]
        if self.end is not None:
            words += ["--until", _date(self.end + timedelta(milliseconds=1))]
        return words

    def command_of(self, one: Traced) -> list[str]:
        """Return the words of the command that shows one activity and every attempt."""
        return ["perqueue", "history", "--outbox", quoted(str(self.outbox)), "--id", str(one.id)]

    def counts_later(self, one: Traced) -> bool:
        """Whether an activity of the period reached Per only after it."""
        return (
            one.settled_at is not None
            and self.end is not None
            and one.settled_at > ms_from_datetime(self.end)
        )


def _users(report: Report) -> Counter[str]:
    users: Counter[str] = Counter()
    for row in report.rows():
        users[row.activity_type_id] += row.unique
    return users


def quoted(text: str) -> str:
    """Return a text as one word of a shell's command line, all of it visible."""
    if text.isprintable():
        return shlex.quote(text)
    parts = (
        c if c.isprintable() and c not in "'\\" else "".join(f"\\x{byte:02x}" for byte in _bytes(c))
        for c in text
    )
    return f"$'{''.join(parts)}'"


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "surrogatepass")


def _date(moment: datetime) -> str:
    return _print.iso(moment).removesuffix("T00:00:00.000Z")
