"""What only an operator asks of an outbox in a database: to requeue or give up what Per refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from perqueue._outbox.postgres.connection import LONG_PATIENCE
from perqueue._outbox.postgres.outbox import PostgresOutbox
from perqueue._outbox.postgres.settling import REQUEUE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_BATCH = 500
_LATEST = "SELECT coalesce(max(rejection), 0) FROM perqueue_settled"
_PAGE = (
    "SELECT id, rejection FROM perqueue_settled WHERE rejection > %s AND rejection <= %s"
    " ORDER BY rejection LIMIT %s"
)
# With a corrected type none of them stands for those of the old one any more.
_RELEASE = (
    "DELETE FROM perqueue_coalesced c USING perqueue_settled s"
    " WHERE s.id = ANY(%s::bigint[]) AND s.state = 2 AND c.activity_id = s.id AND c.activity_type_id <> %s"
    " RETURNING c.activity_id"
)
_DISCARD = """
WITH moved AS (
    UPDATE perqueue_settled SET state = 3, rejection = NULL WHERE id = ANY(%s::bigint[]) AND state = 2
    RETURNING id
), counted AS (
    UPDATE perqueue_outbox SET rejected = rejected - (SELECT count(*) FROM moved),
        discarded = discarded + (SELECT count(*) FROM moved)
    WHERE EXISTS (SELECT FROM moved)
)
SELECT id FROM moved
"""


class PostgresOperator(PostgresOutbox):
    """An outbox in the hands of an operator: the command line opens it so."""

    _patience = LONG_PATIENCE

    def requeue(self, activity_ids: Sequence[int] | None, activity_type_id: str | None = None) -> int:
        """Make rejected activities (None: all) pending again, with a corrected type if one is given."""
        count = 0
        for some in self._in_batches(activity_ids):
            if activity_type_id is not None:
                self._rows(_RELEASE, (some, activity_type_id))
            values = {"ids": some, "kind": activity_type_id, "attempts": 0}
            count += len(self._rows(REQUEUE, values))
        self.request_probe()
        return count

    def discard(self, activity_ids: Sequence[int] | None) -> int:
        """Give up rejected activities (None: all of them); they stay in the audit trail as discarded."""
        return sum(len(self._rows(_DISCARD, (some,))) for some in self._in_batches(activity_ids))

    def _in_batches(self, activity_ids: Sequence[int] | None) -> Iterator[list[int]]:
        if activity_ids is not None:
            for start in range(0, len(activity_ids), _BATCH):
                yield list(activity_ids[start : start + _BATCH])
            return
        # Up to the latest refusal there is now: what is requeued may be refused again meanwhile.
        after, (last,) = 0, self._row(_LATEST)
        while rows := self._rows(_PAGE, (after, last, _BATCH)):
            after = rows[-1][1]
            yield [number for number, _ in rows]
