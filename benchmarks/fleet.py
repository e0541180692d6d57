"""How a fleet of hosts comes back after an outage of Per: peak load, and time to catch up.

In virtual time (see _fleet_model.py), for fleets of three sizes and four ways of a Per to be overloaded; and
once for real, hosts as processes with a sandbox that limits the rate, beside the model of just that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from _fleet_model import Case, Course, play
from _frame import HERE, Row, options, table, write
from _report import cells

from perqueue.sandbox import RateLimit, Sandbox

if TYPE_CHECKING:
    from perqueue.sandbox import ReceivedActivity, RequestSeen

RECORDED, TAKES = 40.0, 400.0
"""A second, of all hosts together: 3,500,000 a day, and a Per that takes ten times that."""
HOSTS = (10, 100, 1000)
OVERLOADS = ("waits", "503", "429", "429, Retry-After")
_PATIENCE = 5
"""Times the least possible after which a host that has not caught up is given up."""
REAL = Case(
    hosts=12, recorded=48.0, takes=200.0, overload="429, Retry-After", outage=120.0, shown=40.0, latency=0.02
)
_BEFORE = 5.0


def metrics(case: Case, course: Course) -> dict[str, list[float]]:
    """Return what is shown of a case."""
    caught_up = [*course.caught_up, *[float("inf")] * course.unfinished]
    last = caught_up[-1]
    came, taken = sum(course.came), sum(course.taken)
    return {
        "probes/s while down": [sum(course.before[-60:]) / len(course.before[-60:])],
        "peak, times what Per takes": [max(course.came) / case.takes],
        "refused, %": [100 * (1 - taken / came)],
        "sent twice, %": [100 * course.sent_twice / taken],
        "most in flight": [float(course.most_in_flight)],
        "half caught up, s": [caught_up[len(caught_up) // 2]],
        "all, s": [last],
        "all, times the least possible": [last / case.at_best],
    }


def modelled(hosts: int, overload: str, outage: float) -> Row:
    """Play one case."""
    case = Case(hosts=hosts, recorded=RECORDED, takes=TAKES, overload=overload, outage=outage)
    case = replace(case, shown=min(case.shown, outage))
    course = play(case, _PATIENCE * case.at_best)
    return Row(group=f"{hosts:,} hosts", case=overload, metrics=metrics(case, course))


class Tally:
    """What arrives at the sandbox, second by second since it is back."""

    def __init__(self) -> None:
        self.back_at = float("inf")
        self.before, self.came, self.taken = Counter[int](), Counter[int](), Counter[int]()
        self.users: Counter[tuple[str, str]] = Counter()

    def request(self, seen: RequestSeen) -> None:
        """Count a request."""
        since = int(time.monotonic() - min(self.back_at, time.monotonic()))
        (self.came if self.back_at < float("inf") else self.before)[since] += 1
        if seen.accepted and self.back_at < float("inf"):
            self.taken[since] += 1

    def activity(self, received: ReceivedActivity) -> None:
        """Count an activity."""
        self.users[received.billing_id, received.user_id] += 1


def real(case: Case) -> Course:
    """Run a case with processes, the sandbox, and the time that it takes."""
    tally = Tally()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        per = stack.enter_context(
            Sandbox(latency=case.latency, on_request=tally.request, on_activity=tally.activity)
        )
        hosts = [_host(stack, per, case, folder / str(number)) for number in range(case.hosts)]
        time.sleep(_BEFORE)
        per.go_down()
        for host in hosts:
            _tell(host, round((case.outage - case.shown) * case.recorded / case.hosts))
        time.sleep(case.shown)
        per.set_fault(RateLimit(per_second=case.takes, retry_after="Retry-After" in case.overload))
        tally.back_at = time.monotonic()
        per.come_back()
        for host in hosts:
            _tell(host, "back")
        caught_up = sorted(float(_hear(host)) for host in hosts)
        lasted = int(caught_up[-1]) + 1
        for host in hosts:
            _tell(host, "end")
            host.wait(60)
        most = per.max_concurrent
    return Course(
        before=[0],
        came=[tally.came[second] for second in range(lasted)],
        taken=[tally.taken[second] for second in range(lasted)],
        caught_up=caught_up,
        unfinished=0,
        sent_twice=sum(tally.users.values()) - len(tally.users),
        most_in_flight=most,
        pending=[],
    )


def _host(stack: ExitStack, per: Sandbox, case: Case, outbox: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "_fleet_host.py"), per.url]
    command += [str(case.recorded / case.hosts), str(outbox)]
    pipe = subprocess.PIPE
    quiet = subprocess.DEVNULL
    host = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=quiet, text=True))
    stack.callback(host.kill)
    _hear(host)
    return host


def _tell(host: subprocess.Popen[str], what: object) -> None:
    assert host.stdin is not None
    host.stdin.write(f"{what}\n")
    host.stdin.flush()


def _hear(host: subprocess.Popen[str]) -> str:
    assert host.stdout is not None
    return host.stdout.readline()


def compared(case: Case) -> list[Row]:
    """Run a case for real, and play it."""
    found = {"processes": metrics(case, real(case)), "model": metrics(case, play(case, 20 * case.at_best))}
    for values in found.values():
        del values["probes/s while down"]  # a sandbox that is down sees none
    return [Row(group=f"{case.hosts} processes", case=name, metrics=values) for name, values in found.items()]


def main() -> None:
    """Measure, print and write."""
    parser = options(__doc__ or "")
    parser.add_argument("--only", metavar="TEXT", help="the groups whose name begins like this")
    given = parser.parse_args()
    rows: list[Row] = []
    for hosts in HOSTS[:1] if given.smoke else HOSTS:
        if given.only is None or f"{hosts:,} hosts".startswith(given.only):
            rows += _show([modelled(hosts, each, 60 if given.smoke else 3600) for each in OVERLOADS])
    if given.only is None or f"{REAL.hosts} processes".startswith(given.only):
        rows += _show(compared(replace(REAL, hosts=2, shown=2, outage=4) if given.smoke else REAL))
    write(given.json, "fleet", rows)


def _show(rows: list[Row]) -> list[Row]:
    head, *lines = cells(rows)
    print(table([rows[0].group, *head[1:]], lines), end="\n\n", flush=True)
    return rows


if __name__ == "__main__":
    main()
