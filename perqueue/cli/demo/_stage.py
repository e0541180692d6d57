"""What the demo's acts are played on: Per, the outbox, the processes, and the look at them all."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from perqueue.cli._sight import snapshot
from perqueue.cli.demo._crew import Recorder, environment
from perqueue.cli.demo._frame import Turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from perqueue._outbox import OperatorOutbox, Position
    from perqueue.cli.demo._crew import User
    from perqueue.cli.demo._frame import Frame, Scene, View
    from perqueue.sandbox import Sandbox

PROCESSES = 3
_RETRY_CAP = 2.0
"""Longest backoff in seconds. It is 60 by default, which is longer than the whole show."""
_SAMPLE = 0.25
_LOOK = 0.08


class Stage:
    """Shows what happens while time passes."""

    def __init__(
        self,
        path: Path,
        per: Sandbox,
        outbox: OperatorOutbox,
        *,
        view: View,
        frame: Frame,
        lose: bool,
        pace: float,
    ) -> None:
        self.path = path
        self.per = per
        self.frame = frame
        self.recorders: list[Recorder] = []
        self.retry_cap = _RETRY_CAP * pace
        self._outbox = outbox
        self._lose = lose
        self._pace = pace
        self._view = view
        self._began = time.monotonic()
        self._next_sample = 0.0

    def hire(self, share: list[User], seconds: float) -> Recorder:
        """Start a process that will record these over so many seconds."""
        orders = {
            "outbox": str(self.path),
            "seconds": seconds * self._pace,
            "retry_cap": self.retry_cap,
            "lose": len(share) // 2 if self._lose and not self.recorders else None,
        }
        recorder = Recorder(share, folder=self.path.parent, environ=environment(self.per), orders=orders)
        self.recorders.append(recorder)
        return recorder

    def begin(self) -> None:
        """Let all record, and count the time from here."""
        for recorder in self.recorders:
            recorder.go()
        self._began = time.monotonic()

    def clear(self) -> None:
        """End what still runs."""
        for recorder in self.recorders:
            if recorder.alive:
                recorder.kill()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    @property
    def recorded(self) -> int:
        """How many activities are acknowledged."""
        return sum(len(recorder.acknowledged) for recorder in self.recorders)

    @property
    def drainer(self) -> int | None:
        """The process that delivers, if it is alive."""
        return self._alive(self._outbox.position())

    def _alive(self, position: Position) -> int | None:
        pid = position.drainer_pid
        ours = (recorder for recorder in self.recorders if recorder.pid == pid and recorder.alive)
        return pid if pid == os.getpid() or any(ours) else None

    def failures(self, after: int = 0) -> list[tuple[str, int]]:
        """Return why requests failed, and how many, without the first so many: the outbox keeps them all."""
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute(
                "SELECT reason, count(*) FROM"
                " (SELECT reason FROM perqueue_attempt ORDER BY id LIMIT -1 OFFSET ?)"
                " GROUP BY reason ORDER BY 2 DESC",
                (after,),
            ).fetchall()

    @property
    def failed(self) -> int:
        """How many requests have failed."""
        return sum(number for _, number in self.failures())

    @contextmanager
    def scene(self, scene: Scene) -> Iterator[None]:
        """Show that this is what happens now, and then that it is over."""
        scene.turn = Turn.NOW
        self.look()
        self._view.scene(self.frame, scene)
        yield
        scene.turn = Turn.OVER
        self.look()
        self._view.scene(self.frame, scene)

    def play(self, seconds: float | None, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, and show it."""
        end = None if seconds is None else time.monotonic() + seconds * self._pace
        while (end is None or time.monotonic() < end) and not until():
            self.look()
            time.sleep(_LOOK)

    def look(self) -> None:
        """Take a look at everything, and show it."""
        frame, position = self.frame, self._outbox.position()
        drainer = self._alive(position)
        frame.elapsed = self.elapsed
        frame.recorded = self.recorded
        frame.stats = snapshot(position, drained=drainer is not None)
        # The killed one is shown until another stands in its place, so that the line stays short.
        alive = [recorder for recorder in self.recorders if recorder.alive]
        shown = alive if len(alive) >= PROCESSES else self.recorders
        frame.processes = [(recorder.pid, _role(recorder, drainer)) for recorder in shown]
        while frame.elapsed >= self._next_sample:
            frame.history.append((position.pending, frame.per))
            self._next_sample += _SAMPLE
        self._view.show(frame)


def _role(recorder: Recorder, drainer: int | None) -> str:
    if recorder.killed:
        return "killed"
    if not recorder.alive:
        return "over"
    role = "done" if recorder.done else "records"
    return f"{role}, delivers" if recorder.pid == drainer else role
