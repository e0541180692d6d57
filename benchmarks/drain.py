"""What delivering costs, end to end (claim, send, parse, settle), beside the ways to send as much with httpx.

Each case sends its requests to a local server in a process of its own and is itself a fresh process. The
cases take turns in rounds, so that a noisy machine is noisy for all; ratios are those of one round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _frame import HERE, Row, figure, fresh, options, table, write
from _report import cells

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = 3
SHARED = "httpx.AsyncClient, shared"
ALONE = "bare asyncio streams, one at a time"
"""Shows the round trip: what the latency really is."""
SHARE = "% of in flight/RTT"
LIMIT = 100.0
"""Requests a second that the server of the last case takes."""
_LIMIT_SECONDS, _SETTLED_AFTER = 60, 20
_BACKLOG_SECONDS = 15.0
"""What perqueue is given to do where the latency decides: its ramp-up is a part of it."""
_PEER_SECONDS = 3.0

SATURATED = {
    SHARED: 700,
    "httpx.AsyncClient, one a task": 2_500,
    "httpx.Client, 1 thread": 5_000,
    "httpx.Client, a thread each": 3_000,
    "httpx.AsyncClient, HTTP/2": 2_500,
    "httpx.AsyncClient over httpx-aiohttp": 6_000,
    "aiohttp": 20_000,
    "bare asyncio streams": 30_000,
    "perqueue over httpx's transport": 3_000,
    "perqueue": 8_000,
    "perqueue[fast]": 10_000,
}
"""Requests for about two seconds of each case, where nothing but the CPU limits it."""
WAITING = {
    8: ("bare asyncio streams", "perqueue", "perqueue[fast]"),
    32: (
        SHARED,
        "httpx.AsyncClient, HTTP/2",
        "httpx.AsyncClient over httpx-aiohttp",
        "aiohttp",
        "bare asyncio streams",
        "perqueue",
        "perqueue[fast]",
    ),
}
WAITING[128] = WAITING[32]


@dataclass(frozen=True)
class Group:
    """Cases that are compared with each other."""

    name: str
    in_flight: int
    numbers: dict[str, int]
    latency: float = 0.0
    tls: bool = False

    def in_flight_of(self, case: str) -> int:
        """Return how many requests a case has in flight."""
        return 1 if case == ALONE else self.in_flight


def groups() -> list[Group]:
    """Return all comparisons, with how many requests each case sends."""
    tls = {case: number // 2 for case, number in SATURATED.items() if "HTTP/2" not in case}
    found = [
        Group("0 ms, 32 in flight", 32, SATURATED),
        Group("0 ms, 32 in flight, TLS", 32, tls, tls=True),
    ]
    for in_flight, cases in WAITING.items():
        numbers = {
            case: round((_BACKLOG_SECONDS if "perqueue" in case else _PEER_SECONDS) * in_flight / 0.05)
            for case in cases
        }
        if in_flight == 128:
            numbers[SHARED] = 150  # it takes 24 ms of CPU for each
        numbers = {ALONE: 60, **numbers}
        found.append(Group(f"50 ms, {in_flight} in flight", in_flight, numbers, latency=0.05))
    return found


def _smoke(group: Group) -> Group:
    """Return a comparison that takes seconds: each case once, and over TLS only what is special there."""
    cases = [case for case in group.numbers if not group.tls or "perqueue" in case or "streams" in case]
    return replace(group, numbers=dict.fromkeys(cases, 2 * group.in_flight))


@contextmanager
def server(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run the local Per; its port is the first line that it prints."""
    command = [sys.executable, str(HERE / "_per.py"), *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _port(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1; return its file and its authority's."""
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    made = authority.issue_cert("127.0.0.1")
    made.private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    return folder / "server.pem", folder / "authority.pem"


def run_case(group: Group, case: str, number: int, files: tuple[Path, Path]) -> dict[str, Any]:
    """Run one case against a server of its own."""
    if "HTTP/2" in case and find_spec("h2") is None:
        return {"missing": "h2"}
    given: list[object] = ["--latency", group.latency]
    given += ["--certificate", files[0]] if group.tls else []
    given += ["--http2"] if "HTTP/2" in case else []
    with server(*given) as process:
        url = f"{'https' if group.tls else 'http'}://127.0.0.1:{_port(process)}"
        sent = ["--url", url, "--number", number, "--in-flight", group.in_flight_of(case)]
        result: dict[str, Any] = fresh("_drain_cases.py", case, *sent, "--authority", files[1])
        return result


def measure(group: Group, rounds: int, files: tuple[Path, Path]) -> list[Row]:
    """Let the cases of a group take turns."""
    metrics: dict[str, dict[str, list[float]]] = {}
    missing: dict[str, str] = {}
    for _ in range(rounds):
        for case, number in group.numbers.items():
            if case in missing:
                continue
            result = run_case(group, case, number, files)
            if "missing" in result:
                missing[case] = result["missing"]
                continue
            values = metrics.setdefault(case, {"requests/s": [], "CPU µs/request": []})
            rate = number / result["seconds"]
            values["requests/s"].append(rate)
            values["CPU µs/request"].append(result["cpu"] / number * 1e6)
            if group.latency:
                round_trips = metrics[ALONE]["requests/s"][-1]
                values.setdefault(SHARE, []).append(rate / group.in_flight_of(case) / round_trips * 100)
    for case, package in missing.items():
        print(f"skipped: {case} ({package} is not installed)", file=sys.stderr)
    return [
        Row(group=group.name, case=case, metrics={name: _rounded(each) for name, each in values.items()})
        for case, values in metrics.items()
    ]


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def show(group: Group, rows: list[Row]) -> None:
    """Print a group's table: medians, and ratios to the shared client with their spread."""
    head, *lines = cells(rows)
    print(table([f"{group.name}; {max(group.numbers.values()):,} requests at most", *head[1:]], lines))
    print(flush=True)


def limited(seconds: float, settled_after: int) -> list[Row]:
    """Drain against a server that refuses what exceeds a rate; see which rate comes of it."""
    with server("--limit", LIMIT, "--latency", 0.02) as process:
        url = f"http://127.0.0.1:{_port(process)}"
        number = round(LIMIT * (seconds + 10) * 1.2)
        fresh("_drain_limited.py", url, number, seconds)
        counts, _ = process.communicate()
    history: list[list[int]] = json.loads(counts.splitlines()[-1])
    steady = history[settled_after:-1] or history
    taken, refused = (sum(second[which] for second in steady) for which in (0, 1))
    metrics = {
        "taken, % of the limit": _rounded([taken / len(steady) / LIMIT * 100]),
        "refused, % of the answers": _rounded([refused / (taken + refused) * 100]),
    }
    each = {
        "taken": [float(second[0]) for second in history],
        "refused": [float(each[1]) for each in history],
    }
    return [
        Row(group="rate limit", case=f"{LIMIT:.0f} requests/s", metrics=metrics),
        Row(group="rate limit, second by second", case=f"{LIMIT:.0f} requests/s", metrics=each),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = options(__doc__ or "")
    parser.add_argument("--only", metavar="TEXT", help="the groups whose name begins like this")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    rounds = 1 if given.smoke else given.rounds
    wanted = [group for group in groups() if given.only is None or group.name.startswith(given.only)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = certificate(Path(folder))
        for group in map(_smoke, wanted[:3]) if given.smoke else wanted:
            measured = measure(group, rounds, files)
            show(group, measured)
            rows += measured
    if given.only is None or "rate limit".startswith(given.only):
        found = limited(2, 1) if given.smoke else limited(_LIMIT_SECONDS, _SETTLED_AFTER)
        for name, values in found[0].metrics.items():
            print(f"a server that takes {LIMIT:.0f} requests/s: {name}: {figure(values[0])}")
        rows += found
    write(given.json, "drain", rows)


if __name__ == "__main__":
    main()
