"""Whether everything that was acknowledged has arrived, and how it went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from perqueue._words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from perqueue._report import Report
    from perqueue.cli.demo._crew import User


@dataclass
class Evidence:
    """What the demo knows at its end."""

    planned: Sequence[User]
    acknowledged: set[User]
    ledger: Counter[User]
    """How often Per accepted each."""
    report: Report | None
    latencies: list[int]
    """Nanoseconds of every ``record()``."""
    outage: float
    """Seconds in which Per was not there."""
    outage_recorded: int
    outage_requests: list[tuple[str, int]]
    """Why a request failed, and how many did."""
    killed: str
    problems: list[str] = field(default_factory=list)
    """What went wrong otherwise, in words."""

    @property
    def lost(self) -> list[User]:
        """Those acknowledged, and not at Per."""
        return sorted(self.acknowledged - self.ledger.keys())

    @property
    def unrecorded(self) -> int:
        """How many were never acknowledged: the show was cut short."""
        return len(set(self.planned) - self.acknowledged)

    @property
    def repeats(self) -> int:
        """How many acceptances repeat an earlier one."""
        return self.ledger.total() - len(self.ledger)

    def disagreements(self) -> list[str]:
        """Return the billing IDs of which Per reports another number than was recorded."""
        return [billing_id for billing_id, recorded, reported in self.usage() if recorded != reported]

    def usage(self) -> list[tuple[str, int, int | None]]:
        """Return, for each billing ID, how many users were recorded and how many Per reports."""
        users = Counter(user.billing_id for user in self.acknowledged)
        report = self.report
        return [
            (billing_id, number, None if report is None else report.unique(billing_id))
            for billing_id, number in sorted(users.items())
        ]

    def holds(self) -> bool:
        """Tell whether all is well."""
        return not (self.lost or self.unrecorded or self.problems or self.disagreements())


def percentile(values: Sequence[int], share: float) -> float:
    """Return the value below which this share of sorted values lies."""
    return float(values[min(len(values) - 1, int(len(values) * share))]) if values else 0.0


def present(evidence: Evidence) -> None:
    """Print the result."""
    console = Console(highlight=False)
    console.print()
    console.print(_usage(evidence))
    console.print()
    console.print(_facts(evidence))
    console.print()
    for line in _verdict(evidence):
        console.print(line)


def _usage(evidence: Evidence) -> Table:
    table = Table(
        box=None, padding=(0, 3, 0, 0), title="Unique users", title_justify="left", title_style="bold"
    )
    table.add_column("billing ID")
    table.add_column("recorded", justify="right")
    table.add_column("Per reports", justify="right")
    table.add_column()
    for billing_id, recorded, reported in evidence.usage():
        shown = "no report" if reported is None else f"{reported:,}"
        mark = "[green]✔[/]" if reported == recorded else "[red]✘[/]"
        table.add_row(billing_id, f"{recorded:,}", shown, mark)
    return table


def _facts(evidence: Evidence) -> Table:
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    ordered = sorted(evidence.latencies)
    marks = ", ".join(
        f"{name} {_duration(percentile(ordered, share))}"
        for name, share in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
    )
    table.add_row("record()", f"{marks}: {len(ordered):,} calls from 4 threads in each of 3 processes")
    requests = ", ".join(f"{number:,} x {reason}" for reason, number in evidence.outage_requests)
    total = sum(number for _, number in evidence.outage_requests)
    table.add_row(
        "outage",
        f"{evidence.outage:.1f} s, {evidence.outage_recorded:,} activities recorded meanwhile,"
        f" and only {counted(total, 'request')}: {requests or 'none'}",
    )
    table.add_row("kill -9", evidence.killed)
    table.add_row("duplicates", _duplicates(evidence.repeats))
    return table


def _duplicates(repeats: int) -> str:
    if not repeats:
        return "none: nothing was accepted more than once"
    return (
        f"{repeats:,} accepted once more: what the killed process had sent or stored, and not yet settled or"
        " acknowledged, is repeated. Reports count unique users, so no bill changes"
    )


def _duration(nanoseconds: float) -> str:
    microseconds = nanoseconds / 1000
    return f"{microseconds:.0f} µs" if microseconds < 1000 else f"{microseconds / 1000:.1f} ms"


def _verdict(evidence: Evidence) -> Iterable[str]:
    if evidence.holds():
        number = len(evidence.acknowledged)
        yield f"[bold green]✔ All {number:,} acknowledged activities are with Per. None is lost.[/]"
        return
    for problem in evidence.problems:
        yield f"[bold red]✘[/] {problem}"
    if evidence.unrecorded:
        yield f"[bold red]✘[/] {counted(evidence.unrecorded, 'activity')} could not be recorded"
    if evidence.lost:
        some = ", ".join(f"{user.user_id} of {user.billing_id}" for user in evidence.lost[:5])
        more = " and others" if len(evidence.lost) > 5 else ""
        yield (
            f"[bold red]✘ {len(evidence.lost):,} of {len(evidence.acknowledged):,} acknowledged activities"
            f" are not with Per: {some}{more}[/]"
        )
    elif evidence.disagreements():
        yield f"[bold red]✘ Per reports other numbers for {', '.join(evidence.disagreements())}[/]"
