"""Looking at an outbox in a database from outside: nothing is written, and nothing stays open."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from perqueue._clock import SYSTEM_CLOCK
from perqueue._outbox.look import NEWEST, Look, Request
from perqueue._outbox.postgres.connection import LONG_PATIENCE
from perqueue._outbox.postgres.counts import CountedSession

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL

_NEXT_DUE = (
    "SELECT (extract(epoch FROM min(not_before) - clock_timestamp()) * 1000)::bigint FROM perqueue_pending"
    " WHERE not_before IS NOT NULL"
)
_ANY_FRESH = "SELECT EXISTS (SELECT FROM perqueue_pending WHERE not_before IS NULL)"
_ANSWERS = "SELECT settled_at, duration_ms FROM perqueue_settled WHERE state <> 4 ORDER BY id DESC LIMIT %s"
_FAILURES = (
    "SELECT attempted_at + duration_ms, duration_ms, reason FROM perqueue_attempt ORDER BY id DESC LIMIT %s"
)
_REFUSALS = (
    "SELECT settled_at, duration_ms, reason FROM perqueue_settled"
    " WHERE rejection IS NOT NULL ORDER BY rejection DESC LIMIT %s"
)


class _Glance(CountedSession):
    """One look."""

    _patience = LONG_PATIENCE


class PostgresOnlooker:
    """Looks at one outbox, as often as is wanted."""

    def __init__(self, url: DatabaseURL) -> None:
        self._url = url

    def look(self) -> Look:
        """Return how it stands now; raise :class:`~perqueue.OutboxError` if it cannot be read."""
        with closing(_Glance(self._url, None, create=False)) as session:
            rows = session._rows  # noqa: SLF001 - of the same family
            position = session.position()
            ((due,),), ((fresh,),) = rows(_NEXT_DUE), rows(_ANY_FRESH)
            return Look(
                outbox_id=session.outbox_id,
                origin=session.origin(),
                position=position if fresh else position._replace(drained_through=position.last_id),
                next_due=None if due is None else SYSTEM_CLOCK.time_ms() + due,
                answers=[Request(*row) for row in rows(_ANSWERS, (NEWEST,))],
                failures=[Request(*row) for row in rows(_FAILURES, (NEWEST,))],
                refusals=[Request(*row) for row in rows(_REFUSALS, (NEWEST,))],
                drainers=tuple(session.drainers()),
            )
