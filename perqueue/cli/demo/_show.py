"""The demo's script: what happens, and in which order."""

from __future__ import annotations

import signal
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
from perqueue._words import counted
from perqueue.cli._flush import watched_flush
from perqueue.cli.demo._crew import User
from perqueue.cli.demo._frame import Frame, PerIs, Scene
from perqueue.cli.demo._stage import PROCESSES, Stage
from perqueue.cli.demo._verdict import Evidence, present
from perqueue.exceptions import PerQueueError
from perqueue.sandbox import Sandbox, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from perqueue._report import Report
    from perqueue.cli.demo._frame import View

_RECORDING = 13.0
"""Seconds over which the activities are recorded."""
_LATENCY = 0.02
"""Seconds before each of Per's answers, about as far away as another city."""
_BILLING_IDS = ("GROUP_A", "GROUP_B", "GROUP_C", "GROUP_D")


def perform(total: int, view: View, *, lose: bool, pace: float) -> bool:
    """Play it all, print the result, and return whether every acknowledged activity has arrived."""
    show = Show(total)
    with ExitStack() as stack:
        stack.enter_context(_terminable())
        # In this order, so that what writes to the folder has ended when it is removed.
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="perqueue-demo-")))
        per = stack.enter_context(Sandbox(latency=_LATENCY))
        path = folder / "activities.db"
        outbox = stack.enter_context(closing(OperatorOutbox(path, per.url)))
        stage = Stage(path, per, outbox, view=view, frame=show.frame, lose=lose, pace=pace)
        stack.callback(stage.clear)
        stack.enter_context(view)
        show.play(stage)
        evidence = show.evidence(stage)
    present(evidence)
    return evidence.holds()


class Show:
    """One performance, and what it leaves to be judged."""

    def __init__(self, total: int) -> None:
        self._planned = [User(_BILLING_IDS[n % len(_BILLING_IDS)], f"USER_{n:06}") for n in range(total)]
        self._up = Scene("Per is up", "what is recorded arrives at once")
        self._failing = Scene("Per answers 503", "recording goes on, the outbox keeps it")
        self._gone = Scene("Per is gone", "connections are refused")
        self._back = Scene("Per is back", "the backlog is delivered, carefully at first")
        self._kill = Scene("kill -9", "the very process that delivers")
        self._again = Scene("start it again", "it records what it had not acknowledged")
        self._flush = Scene("flush()", "returns when Per has everything")
        scenes = [self._up, self._failing, self._gone, self._back, self._kill, self._again, self._flush]
        self.frame = Frame(total=total, scenes=scenes)
        self._outage = (0.0, 0, 0)
        self._problems: list[str] = []
        self._report: Report | None = None

    def play(self, stage: Stage) -> None:
        """Play all acts."""
        started = datetime.now(UTC)
        for number in range(PROCESSES):
            stage.hire(self._planned[number::PROCESSES], _RECORDING)
        stage.begin()
        with stage.scene(self._up):
            stage.play(2.5)
        self._act_outage(stage)
        self._act_kill(stage)
        with stage.scene(self._flush):
            self._act_flush(stage, started)
        self._problems += filter(None, [recorder.end() for recorder in stage.recorders])

    def _act_outage(self, stage: Stage) -> None:
        per, frame = stage.per, self.frame
        before, recorded, failed = stage.elapsed, stage.recorded, stage.failed
        with stage.scene(self._failing):
            per.set_fault(Status(503))
            frame.per = PerIs.FAILING
            stage.play(2.5)
            self._failing.remark = _toll(stage, recorded, failed)
        recorded_then, failed_then = stage.recorded, stage.failed
        with stage.scene(self._gone):
            per.go_down()
            frame.per = PerIs.GONE
            stage.play(3.0)
            self._gone.remark = _toll(stage, recorded_then, failed_then)
        per.clear_faults()
        per.come_back()
        frame.per = PerIs.UP
        self._outage = (stage.elapsed - before, stage.recorded - recorded, failed)
        with stage.scene(self._back):
            enough = per.accepted + self.frame.total // 15
            stage.play(8.0, until=lambda: per.accepted >= enough)

    def _act_kill(self, stage: Stage) -> None:
        with stage.scene(self._kill):
            drainer = stage.drainer
            victim = next((each for each in stage.recorders if each.pid == drainer), stage.recorders[0])
            rest = victim.kill()
            killed_at = stage.elapsed
            stage.play(4.0, until=lambda: stage.drainer is not None)
            took = stage.elapsed - killed_at
            self._kill.remark = f"process {victim.pid} is gone; another delivers after {took:.1f} s"
        with stage.scene(self._again):
            again = stage.hire(rest, 2.5)
            self._again.remark = f"process {again.pid} records the {len(rest):,} not acknowledged"
            again.go()
            stage.play(None, until=lambda: all(recorder.done for recorder in stage.recorders))

    def _act_flush(self, stage: Stage, started: datetime) -> None:
        per = stage.per

        def pause(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        queue = PerQueue(
            stage.path,
            base_url=per.url,
            activity_token=per.activity_token,
            reporting_token=per.reporting_token,
            activity_type_id=per.activity_type_id,
            drain=True,
            retry=RetryPolicy(cap=stage.retry_cap),
        )
        with closing(queue):
            try:
                watched_flush(queue, timeout=None, patience=15.0, look=lambda _: stage.look(), pause=pause)
                self._flush.remark = "it has returned: Per has everything"
                self._report = queue.get_report(started)
            except PerQueueError as error:
                self._flush.remark = "it has failed"
                self._problems.append(str(error))

    def evidence(self, stage: Stage) -> Evidence:
        """Return what is known at the end."""
        seconds, recorded, failed = self._outage
        return Evidence(
            planned=self._planned,
            acknowledged={user for recorder in stage.recorders for user in recorder.acknowledged},
            ledger=Counter(User(each.billing_id, each.user_id) for each in stage.per.activities),
            report=self._report,
            latencies=[took for recorder in stage.recorders for took in recorder.latencies],
            outage=seconds,
            outage_recorded=recorded,
            outage_requests=stage.failures(after=failed),
            killed=self._kill.remark,
            problems=self._problems,
        )


def _toll(stage: Stage, recorded: int, failed: int) -> str:
    requests = counted(stage.failed - failed, "request")
    return f"{stage.recorded - recorded:,} recorded meanwhile, {requests} failed"


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
