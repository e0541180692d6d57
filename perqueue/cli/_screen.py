"""The live picture of ``perqueue status --watch``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from perqueue._outbox.look import NEWEST
from perqueue.cli import _print
from perqueue.cli._chart import chart
from perqueue.cli._health import PAUSES, Mood
from perqueue.cli._health import clock as time_of_day
from perqueue.cli._track import LATELY_MS

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from perqueue._outbox.look import Look
    from perqueue.cli._track import Errors, Percentiles, Picture

_WIDEST = 120
_COLOURS = {Mood.WELL: "green", Mood.WAITING: "yellow", Mood.TROUBLE: "red"}
_MARKS = {Mood.WELL: "●", Mood.WAITING: "▲", Mood.TROUBLE: "✖"}  # who sees no colours sees these
_A_DAY_MS = 86_400_000
_LEAST_PEAK = 50
"""So many pending fill the chart: a few in passing are no mountain."""


class Screen:
    """Fills the terminal, and gives it back as it was."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._console = Console(highlight=False)
        self._live = Live(
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def show(self, picture: Picture) -> None:
        """Paint it, as large as the terminal is now."""
        width, height = min(self._console.width, _WIDEST), self._console.height
        self._live.update(self._panel(picture, width, height), refresh=True)

    def _panel(self, picture: Picture, width: int, height: int) -> Panel:
        inner = width - 4
        head = _head(self._console, picture, inner)
        facts = _facts(picture)
        left = height - 2 - len(head) - len(facts) - 2
        errors = _errors(picture, inner, max(1, left - 6) if left > 8 else max(0, left - 4))
        parts = [*head, Text()]
        rows = left - len(errors) - 1 - bool(errors)
        if picture.history and rows > 0:
            parts += [*_history(picture, inner, min(rows, 10)), Text()]
        parts += [_aligned(facts)]
        if errors:
            parts += [Text(), *errors]
        return Panel(
            Group(*parts),
            title=Text.assemble(("perqueue", "bold"), f"  {_print.printable(str(picture.sight.path))}"),
            title_align="left",
            subtitle=f"{time.strftime('%H:%M:%S')}, every {self._interval:g} s, Ctrl-C ends",
            subtitle_align="right",
            width=width,
            height=height,
            border_style="dim",
        )


def _head(console: Console, picture: Picture, width: int) -> list[Text | Table]:
    """Say what goes on, and below it what to do."""
    health = picture.health
    said = Text(_print.printable(health.text), f"bold {_COLOURS[health.mood]}")
    lines = [Text(f"{_MARKS[health.mood]} ", _COLOURS[health.mood]) + line
             for line in said.wrap(console, width - 2)[:1]]  # fmt: skip
    lines += [Text("  ") + line for line in said.wrap(console, width - 2)[1:4]]
    if health.remedy:
        lines += [Text("  ") + line for line in Text(f"→ {health.remedy}").wrap(console, width - 2)[:3]]
    return list(lines)


def _history(picture: Picture, width: int, height: int) -> list[Text]:
    columns = [(sample.pending, _COLOURS[sample.mood]) for sample in picture.history]
    peak = max(pending for pending, _ in columns)
    span = _print.age(picture.history[-1].at - picture.history[0].at)
    return [
        *chart(columns, width, height, least=_LEAST_PEAK),
        Text(f"pending over the last {span}, peak {peak:,}", "dim"),
    ]


Fact = tuple[str, Text]


def _facts(picture: Picture) -> list[Fact]:
    look = picture.sight.look
    if look is None:
        return []
    position, rates = look.position, picture.rates
    rejected = f"{position.rejected:,}" + ("  (perqueue rejected list)" if position.rejected else "")
    delivered = f"{position.accepted:,} in all"
    if rates is not None:
        delivered = f"{_print.rate(rates.delivered)}/s, {delivered}"
    facts = [
        ("pending", _pending(picture, look)),
        ("recorded", Text("measuring" if rates is None else f"{_print.rate(rates.recorded)}/s")),
        ("delivered", Text(delivered)),
        ("rejected", Text(rejected, "yellow" if position.rejected else "")),
        ("in flight", Text(_in_flight(picture, look))),
        ("drainer", Text(_drainer(picture, look))),
        ("answers", _took(picture.answers)),
        ("failures", _took(picture.failures)),
    ]
    if position.damaged:
        facts.insert(4, ("damaged", Text(f"{position.damaged:,}  (perqueue doctor)", "red")))
    return facts


def _pending(picture: Picture, look: Look) -> Text:
    position, rates = look.position, picture.rates
    text = Text(f"{position.pending:,}", "bold")
    if rates is not None:
        colour = "yellow" if rates.pending > 0 else "green" if rates.pending < 0 else ""
        text.append(f"  {_print.signed(rates.pending)}/s", colour)
    if picture.sight.oldest_age is not None:
        text.append(f"  the oldest for {_print.age(picture.sight.oldest_age)}")
    if rates is not None and position.pending > -rates.pending > 0 and picture.health.mood is Mood.WELL:
        text.append(f"  empty in about {_print.age(position.pending / -rates.pending)}", "dim")
    return text


def _in_flight(picture: Picture, look: Look) -> str:
    if not look.position.pending or picture.sight.drained is False:
        return "none"
    if look.position.hold is not None:
        return "at most 1, the probe"
    load = look.position.load
    rate = f"; Per takes {load.rate:,.0f}/s" if load.rate is not None else ""
    return f"{load.in_flight:,} of at most {load.limit:,}{rate}"


def _drainer(picture: Picture, look: Look) -> str:
    sight = picture.sight
    if sight.drained is None:
        return "unknown: this user may not look at the drain lock"
    if sight.drained:
        return sight.drainer
    paused = look.position.pending and look.position.hold and look.position.hold.kind in PAUSES
    return "none while paused" if paused else "none"


def _took(requests: Percentiles | None) -> Text:
    window = f"in the last {_print.age(LATELY_MS / 1000)}"
    if requests is None:
        return Text(f"none {window}", "dim")
    text = Text(f"p50 {requests.p50:,} ms  p95 {requests.p95:,} ms  p99 {requests.p99:,} ms")
    return text.append(f"  newest {requests.requests:,} {window}", "dim")


def _aligned(facts: list[Fact]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=9)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, value in facts:
        table.add_row(name, value)
    return table


def _errors(picture: Picture, width: int, room: int) -> list[Text]:
    """List as many reasons as there is room for, the latest first."""
    if not picture.errors or room < 1:
        return []
    shown = picture.errors[:room]
    lines = [Text(f"last errors, among the newest {NEWEST}", "dim")]
    for each in shown:
        line = Text(f"{each.times:>6,}  {_when(each, picture.sight.now)}  ", no_wrap=True)
        line.append(_print.printable(each.reason))
        line.truncate(width, overflow="ellipsis")
        lines.append(line)
    return lines


def _when(error: Errors, now: int) -> str:
    if abs(now - error.last_at) < _A_DAY_MS:
        return time_of_day(error.last_at)
    return time.strftime("%Y-%m-%d", time.localtime(error.last_at / 1000))
