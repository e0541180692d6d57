"""The demo's two views: a live picture for a terminal, and plain lines for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from perqueue.cli._chart import chart
from perqueue.cli.demo._frame import PerIs, Turn

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from perqueue.cli.demo._frame import Frame, Scene, View

_COLOURS = {PerIs.UP: "green", PerIs.FAILING: "yellow", PerIs.GONE: "red"}
_MARKS = {Turn.COMING: ("·", "dim"), Turn.NOW: ("▶", "bold cyan"), Turn.OVER: ("✔", "green")}
_CHART_ROWS = 4
_LINE_INTERVAL = 2.0


def live_view() -> View:
    """Return the picture."""
    return _LiveView()


def plain_view() -> View:
    """Return the lines."""
    return _PlainView()


def state_of(frame: Frame) -> str:
    """Return what the drain does, in words."""
    state, reason = frame.stats.get("state"), frame.stats.get("reason")
    if state == "off":
        return "nobody delivers; another process takes over"
    return str(state or "").replace("_", " ") + (f": {reason}" if reason else "")


class _PlainView:
    """Prints a line for each scene, and one now and then between."""

    def __init__(self) -> None:
        self._next = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is open."""

    def scene(self, frame: Frame, scene: Scene) -> None:
        over = scene.turn is Turn.OVER
        self._line(frame, f"{'  done: ' if over else ''}{scene.title}: {scene.remark}")

    def show(self, frame: Frame) -> None:
        if frame.elapsed >= self._next:
            self._next = frame.elapsed + _LINE_INTERVAL
            stats = frame.stats
            counts = (
                f"recorded {frame.recorded:,}, pending {stats['pending']:,}, delivered {stats['delivered']:,}"
            )
            self._line(frame, f"  {counts}; {state_of(frame)}")

    def _line(self, frame: Frame, text: str) -> None:
        print(f"[{frame.elapsed:5.1f} s] {text}", flush=True)  # noqa: T201 - click.echo does no more


class _LiveView:
    """Repaints one panel of 21 lines, so that it fits on a terminal of 80 by 24."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, refresh_per_second=12, redirect_stdout=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def scene(self, frame: Frame, scene: Scene) -> None:  # noqa: ARG002 - the picture shows all scenes
        self.show(frame)

    def show(self, frame: Frame) -> None:
        self._live.update(self._picture(frame))

    def _picture(self, frame: Frame) -> Panel:
        width = min(self._console.width, 100)
        title = f"[bold]perqueue demo[/]  {frame.total:,} activities, 3 processes, one outbox"
        return Panel(
            Group(
                _scenes(frame),
                Text(),
                *_chart(frame, width - 6),
                Text(),
                *_bars(frame, width - 6),
                _facts(frame),
            ),
            title=title,
            title_align="left",
            subtitle=f"{frame.elapsed:.0f} s",
            subtitle_align="right",
            width=width,
            padding=(0, 2),
            border_style="dim",
        )


def _scenes(frame: Frame) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for scene in frame.scenes:
        mark, style = _MARKS[scene.turn]
        title_style = "dim" if scene.turn is Turn.COMING else "bold" if scene.turn is Turn.NOW else ""
        remark_style = "" if scene.turn is Turn.NOW else "dim"
        table.add_row(Text(mark, style), Text(scene.title, title_style), Text(scene.remark, remark_style))
    return table


def _chart(frame: Frame, width: int) -> list[Text]:
    """Draw the pending activities over time, in the colour of what Per did then."""
    rows = chart([(pending, _COLOURS[per]) for pending, per in frame.history], width, _CHART_ROWS)
    top = max((pending for pending, _ in frame.history), default=0)
    legend = Text("▔" * width, "dim")
    caption = Text.assemble(("pending over time   Per ", "dim"))
    for per, colour in _COLOURS.items():
        caption.append("■ ", colour).append(f"{per}  ", "dim")
    caption.append(f" peak {top:,}" if top > 1 else "", "dim")
    return [*rows, legend, caption]


def _bars(frame: Frame, width: int) -> list[Text]:
    delivered = frame.stats.get("delivered", 0)
    return [
        _bar("recorded", frame.recorded, frame.total, width, "cyan"),
        _bar("delivered", delivered, frame.total, width, "green"),
    ]


def _bar(name: str, value: int, total: int, width: int, colour: str) -> Text:
    room = width - 22
    full = min(room, room * value // total)
    return Text.assemble(
        f"{name:<11}", ("━" * full, colour), ("━" * (room - full), "bright_black"), f"{value:>10,}"
    )


def _facts(frame: Frame) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=9)
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_row("drain", Text(state_of(frame), _COLOURS[frame.per]))
    table.add_row("processes", Text("   ".join(f"{pid} {what}" for pid, what in frame.processes)))
    return table
