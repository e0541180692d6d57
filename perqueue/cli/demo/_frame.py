"""What the demo shows at one moment; the views paint it, each in its way."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class PerIs(StrEnum):
    """What Per does at the moment."""

    UP = "up"
    FAILING = "answers 503"
    GONE = "is gone"


class Turn(StrEnum):
    """Where a scene stands."""

    COMING = "coming"
    NOW = "now"
    OVER = "over"


@dataclass
class Scene:
    """One act of the show."""

    title: str
    remark: str
    turn: Turn = Turn.COMING


@dataclass
class Frame:
    """Everything that is shown."""

    total: int
    scenes: list[Scene]
    elapsed: float = 0.0
    per: PerIs = PerIs.UP
    recorded: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    """The fields of :class:`perqueue.Stats`."""
    processes: list[tuple[int, str]] = field(default_factory=list)
    """Process IDs, and what each does."""
    history: list[tuple[int, PerIs]] = field(default_factory=list)
    """Pending activities, at equal intervals."""


class View(Protocol):
    """Shows frames until it is left."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def scene(self, frame: Frame, scene: Scene) -> None:
        """A scene has begun, or is over."""

    def show(self, frame: Frame) -> None:
        """Time has passed."""
