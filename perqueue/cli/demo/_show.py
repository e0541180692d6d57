"""The demo's script: what happens, in which order, and what is looked at meanwhile."""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from perqueue._outbox import OperatorOutbox
from perqueue._recorder import PerQueue
from perqueue._settings import RetryPolicy
from perqueue.cli._flush import watched_flush
from perqueue.cli.demo._crew import Recorder, User, environment
from perqueue.cli.demo._frame import Frame, PerIs, Scene, Turn
from perqueue.cli.demo._verdict import Evidence, present
from perqueue.cli.status import snapshot
from perqueue.exceptions import PerQueueError
from perqueue.sandbox import Sandbox, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from perqueue._report import Report
    from perqueue._stats import Stats
    from perqueue.cli.demo._frame import View

_PROCESSES = 3
_RECORDING = 13.0
"""Seconds over which the activities are recorded."""
_RETRY_CAP = 2.0
"""Longest backoff. It is 60 s by default, which is longer than the whole show."""
_SAMPLE = 0.25
_BILLING_IDS = ("GROUP_A", "GROUP_B", "GROUP_C", "GROUP_D")


class Show:
    """One performance."""

    def __init__(self, total: int, view: View, *, lose: bool) -> None:
        self._view = view
        self._lose = lose
        self._planned = [User(_BILLING_IDS[n % len(_BILLING_IDS)], f"USER_{n:06}") for n in range(total)]
        self._up = Scene("Per is up", "what is recorded arrives at once")
        self._failing = Scene("Per answers 503", "recording goes on, the outbox keeps it")
        self._gone = Scene("Per is gone", "connections are refused")
        self._back = Scene("Per is back", "the backlog is delivered, carefully at first")
        self._kill = Scene("kill -9", "the very process that delivers")
        self._again = Scene("start it again", "it records what it had not acknowledged")
        self._flush = Scene("flush()", "until Per has everything")
        scenes = [self._up, self._failing, self._gone, self._back, self._kill, self._again, self._flush]
        self._frame = Frame(total=total, scenes=scenes)
        self._recorders: list[Recorder] = []
        self._began = time.monotonic()
        self._next_sample = 0.0
        self._killed = ""
        self._outage = (0.0, 0, 0)

    def run(self) -> bool:
        """Perform, print the result, and return whether every acknowledged activity has arrived."""
        with ExitStack() as stack:
            stack.enter_context(_terminable())
            # Not cleaned up before the processes that write there have ended.
            self._folder = Path(stack.enter_context(TemporaryDirectory(prefix="perqueue-demo-")))
            self._path = self._folder / "activities.db"
            self._per = per = stack.enter_context(Sandbox(latency=0.02))
            stack.callback(self._end_recorders)
            # Created here, for the origin that the recorders will name.
            self._outbox = stack.enter_context(closing(OperatorOutbox(self._path, per.url)))
            started = datetime.now(UTC)
            with self._view:
                self._start_recorders()
                self._act_outage()
                self._act_kill()
                problems = self._act_end_of_recording()
                report = self._act_flush(started, problems)
            evidence = self._evidence(report, problems)
        present(evidence)
        return evidence.holds()

    # -- the acts

    def _start_recorders(self) -> None:
        shares = [self._planned[number::_PROCESSES] for number in range(_PROCESSES)]
        for number, share in enumerate(shares):
            self._recorders.append(self._recorder(share, _RECORDING, lose=self._lose and number == 0))
        for recorder in self._recorders:
            recorder.go()
        self._began = time.monotonic()

    def _act_outage(self) -> None:
        per, frame = self._per, self._frame
        with self._scene(self._up):
            self._play(2.5)
        recorded, requests, began = self._recorded(), self._failed_requests(), time.monotonic()
        with self._scene(self._failing):
            per.set_fault(Status(503))
            frame.per = PerIs.FAILING
            self._play(2.5)
            self._failing.remark = self._toll(recorded, requests)
        recorded_then, requests_then = self._recorded(), self._failed_requests()
        with self._scene(self._gone):
            per.go_down()
            frame.per = PerIs.GONE
            self._play(3.0)
            self._gone.remark = self._toll(recorded_then, requests_then)
        per.clear_faults()
        per.come_back()
        frame.per = PerIs.UP
        self._outage = (time.monotonic() - began, self._recorded() - recorded, requests)
        with self._scene(self._back):
            enough = per.accepted + 400
            self._play(8.0, until=lambda: per.accepted >= enough)
            self._back.remark = "the backlog is on its way"

    def _act_kill(self) -> None:
        with self._scene(self._kill):
            drainer = self._outbox.position().drainer_pid
            victim = next((r for r in self._recorders if r.pid == drainer), self._recorders[0])
            rest = victim.kill()
            killed_at = time.monotonic()
            self._play(4.0, until=lambda: self._drainer() is not None)
            took = time.monotonic() - killed_at
            self._kill.remark = f"process {victim.pid}, while it delivered; another took over in {took:.1f} s"
            self._killed = self._kill.remark
        with self._scene(self._again):
            left = max(2.0, _RECORDING - (time.monotonic() - self._began))
            again = self._recorder(rest, left)
            self._recorders.append(again)
            again.go()
            self._again.remark = f"process {again.pid} records the {len(rest):,} that were not acknowledged"
            self._play(0.5)

    def _act_end_of_recording(self) -> list[str]:
        self._play(None, until=lambda: not any(recorder.alive for recorder in self._recorders))
        problems = [recorder.wait() for recorder in self._recorders]
        return [problem for problem in problems if problem]

    def _act_flush(self, started: datetime, problems: list[str]) -> Report | None:
        per = self._per

        def look(_: Stats) -> None:
            self._look()

        def pause(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        with (
            self._scene(self._flush),
            closing(
                PerQueue(
                    self._path,
                    base_url=per.url,
                    activity_token=per.activity_token,
                    reporting_token=per.reporting_token,
                    activity_type_id=per.activity_type_id,
                    drain=True,
                    retry=RetryPolicy(cap=_RETRY_CAP),
                )
            ) as queue,
        ):
            began = time.monotonic()
            try:
                watched_flush(queue, timeout=None, patience=15.0, look=look, pause=pause)
                self._flush.remark = f"returned after {time.monotonic() - began:.1f} s: Per has everything"
                return queue.get_report(started)
            except PerQueueError as error:
                problems.append(str(error))
                return None

    # -- what the acts need

    def _recorder(self, share: list[User], seconds: float, *, lose: bool = False) -> Recorder:
        orders = {
            "outbox": str(self._path),
            "seconds": seconds,
            "retry_cap": _RETRY_CAP,
            "lose": len(share) // 2 if lose else None,
        }
        return Recorder(share, folder=self._folder, environ=environment(self._per), orders=orders)

    def _end_recorders(self) -> None:
        for recorder in self._recorders:
            if recorder.alive:
                recorder.kill()

    @contextmanager
    def _scene(self, scene: Scene) -> Iterator[None]:
        scene.turn = Turn.NOW
        self._look()
        self._view.scene(self._frame, scene)
        yield
        scene.turn = Turn.OVER
        self._look()
        self._view.scene(self._frame, scene)

    def _play(self, seconds: float | None, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, and show it."""
        end = None if seconds is None else time.monotonic() + seconds
        while (end is None or time.monotonic() < end) and not until():
            self._look()
            time.sleep(0.05)

    def _look(self) -> None:
        frame = self._frame
        frame.elapsed = time.monotonic() - self._began
        frame.recorded = self._recorded()
        drainer = self._drainer()
        frame.stats = snapshot(self._outbox.position(), drained=drainer is not None)
        frame.processes = [(r.pid, _role(r, drainer)) for r in self._recorders]
        while frame.elapsed >= self._next_sample:
            frame.history.append((frame.stats["pending"], frame.per))
            self._next_sample += _SAMPLE
        self._view.show(frame)

    def _drainer(self) -> int | None:
        pid = self._outbox.position().drainer_pid
        return pid if pid == os.getpid() or any(r.pid == pid and r.alive for r in self._recorders) else None

    def _recorded(self) -> int:
        return sum(len(recorder.acknowledged) for recorder in self._recorders)

    def _toll(self, recorded: int, requests: int) -> str:
        sent = self._failed_requests() - requests
        return f"{self._recorded() - recorded:,} recorded meanwhile, and {sent:,} requests sent"

    def _failed_requests(self) -> int:
        return sum(number for _, number in self._failures())

    def _failures(self, after: int = 0) -> list[tuple[str, int]]:
        with closing(sqlite3.connect(self._path)) as connection:
            return connection.execute(
                "SELECT reason, count(*) FROM (SELECT reason FROM perqueue_attempt ORDER BY id LIMIT -1 OFFSET ?)"
                " GROUP BY reason ORDER BY 2 DESC",
                (after,),
            ).fetchall()

    def _evidence(self, report: Report | None, problems: list[str]) -> Evidence:
        outage, recorded, requests = self._outage
        return Evidence(
            planned=self._planned,
            acknowledged={user for recorder in self._recorders for user in recorder.acknowledged},
            ledger=Counter(User(a.billing_id, a.user_id) for a in self._per.activities),
            report=report,
            latencies=[took for recorder in self._recorders for took in recorder.latencies],
            outage=outage,
            outage_recorded=recorded,
            outage_requests=self._failures(requests),
            killed=self._killed,
            problems=problems,
        )


def _role(recorder: Recorder, drainer: int | None) -> str:
    if recorder.killed:
        return "killed"
    if not recorder.alive:
        return "done"
    return "delivers" if recorder.pid == drainer else "records"


@contextmanager
def _terminable() -> Iterator[None]:
    """Have SIGTERM end the show as Ctrl-C does: processes and files are cleaned up."""

    def stop(_number: int, _frame: object) -> None:
        sys.exit(143)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
