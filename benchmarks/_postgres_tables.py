"""What recorders and drainers do in small and large tables of PostgreSQL, and beside a long transaction."""

from __future__ import annotations

import functools
import statistics
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING

import psycopg
from _postgres_server import GROUP, KIND, server
from _rounds import Case, timed

from perqueue._activity import Event, Settlement
from perqueue._address import DatabaseURL
from perqueue._outbox.postgres.outbox import PostgresOutbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from _postgres_server import Measured
    from _rounds import Metrics

_ROWS = 10_000_000
_PASSED = 200_000
"""As many settled activities lead a drainer to write down where the pending ones begin."""
_BATCH = 100
_NOW = 1_700_000_000_000


class _Drainer:
    """What a drainer does, Per apart."""

    def __init__(self, outbox: PostgresOutbox) -> None:
        self._outbox = outbox
        self._after = 0

    def pass_on(self, _: int = 0) -> None:
        """Claim a hundred, and settle them."""
        claimed = self._outbox.claim(self._after, _BATCH)
        self._after = max([self._after, *(each.id for each in claimed)])
        outcomes = [
            Settlement(activity=each, event=Event.ACCEPT, answered_at=_NOW, transaction_id="x" * 20)
            for each in claimed
        ]
        self._outbox.settle(outcomes, drained_through=0, refusals=(0, None))

    def sweep(self, _: int = 0) -> None:
        """Do the same with a claim that looks from the oldest on."""
        self._outbox._sweep_at = float("-inf")  # noqa: SLF001 - as every second or more
        self.pass_on()

    def pass_many(self, number: int) -> None:
        """Deliver so many."""
        for batch in range(number // _BATCH):
            if not batch % 100:
                self._outbox.keep_lease()
            self.pass_on()


def _steps(outbox: PostgresOutbox, drainer: _Drainer) -> Metrics:
    """Return what each step takes, in milliseconds."""
    found = {}
    for name, call, times in (
        ("record()", lambda number: outbox.append(GROUP, f"USER_{number}", KIND, _NOW), 200),
        ("claim and settle 100", drainer.pass_on, 50),
        ("from the oldest on", drainer.sweep, 10),
        ("stats()", lambda _: outbox.position(), 20),
        ("a step of pruning", lambda _: outbox.prune(0, 10**12, 50), 10),
    ):
        found[name] = statistics.median(timed(call, times, warm_up=1)) / 1e6
    return found


@contextmanager
def _transaction(database: Measured) -> Iterator[None]:
    """Keep a transaction open: nothing that is deleted meanwhile can be removed."""
    with psycopg.connect(database.url) as idle:
        idle.execute("SELECT txid_current()")
        yield


def _looked_at(rows: int, passed: int, beside: bool, _: Path, part: float) -> Metrics:  # noqa: FBT001
    with server() as database:
        database.fill(settled=int(rows * part), pending=int(rows * part) + _BATCH * 100)
        with closing(PostgresOutbox(DatabaseURL(database.url), "http://127.0.0.1:9")) as outbox:
            outbox.begin_term()
            drainer = _Drainer(outbox)
            with _transaction(database) if beside else nullcontext():
                drainer.pass_many(int(passed * part))
                return _steps(outbox, drainer)


def cases() -> Iterator[Case]:
    """Yield the lines of the table."""
    for name, rows, passed, beside in (
        ("empty", 0, 0, False),
        ("10,000,000 settled, 10,000,000 pending", _ROWS, 0, False),
        ("the same, 200,000 delivered since", _ROWS, _PASSED, False),
        ("the same, 400,000, beside a transaction that stays open", _ROWS, 2 * _PASSED, True),
    ):
        run = functools.partial(_looked_at, rows, passed, beside)
        yield Case(group="tables", name=name, unit="ms", smoke=beside, run=run)
