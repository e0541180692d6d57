"""Opening an outbox, whatever it is made of: to use it, to look after it, to read its trail, or to look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from perqueue._address import DatabaseURL
from perqueue._outbox.protocol import Outbox
from perqueue._outbox.sqlite import SQLiteOutbox

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from perqueue._activity import State
    from perqueue._outbox.finding import Finding
    from perqueue._outbox.flow import Known
    from perqueue._outbox.look import Look
    from perqueue._outbox.trail import Filter, Traced, Try

    Relevant = tuple[int, tuple[str, str, str], int, State, int, int]
    """Number, key (activity type, billing ID, user ID), when recorded, state, when settled, duration."""


class Operator(Outbox, Protocol):
    """An outbox in the hands of an operator: the command line opens it so."""

    def requeue(self, activity_ids: Sequence[int] | None, activity_type_id: str | None = None) -> int:
        """Make rejected activities (None: all) pending again, with a corrected type if one is given."""

    def discard(self, activity_ids: Sequence[int] | None) -> int:
        """Give up rejected activities (None: all of them); they stay in the audit trail as discarded."""


class Trail(Protocol):
    """The audit trail of an outbox, read a slice at a time beside whoever writes."""

    def origin(self) -> str | None:
        """Return whose Per the outbox belongs to; None before that is known."""

    def trace(self, wanted: Filter, after: int, limit: int) -> list[Traced]:
        """Return activities above an ID, oldest first, up to a limit."""

    def trace_one(self, activity_id: int) -> tuple[Traced, list[Try]] | None:
        """Return one activity and every request for it; None if there is none of this number."""

    def slices_until(self, until: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of numbers, both ends included, that hold all that was recorded before a time."""

    def relevant(self, low: int, high: int, start: int) -> Iterable[Relevant]:
        """Yield the activities of a range of numbers that a period from ``start`` on may concern."""

    def attempted(self, low: int, high: int, since: int, until: int) -> Sequence[tuple[int, object]]:
        """Return activity and reason of every request between two times that brought no acceptance."""

    def lost_through(self) -> int:
        """Return until when settled activities may have been deleted (milliseconds since the epoch)."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Onlooker(Protocol):
    """Looks at one outbox, as often as is wanted."""

    def look(self) -> Look:
        """Return how it stands now; raise :class:`~perqueue.OutboxError` if it cannot be read."""


def open_outbox(place: Path | DatabaseURL, origin: str | None, **options: Any) -> Outbox:
    """Open, or create, the outbox of a file or a database; options as :class:`SQLiteOutbox` has them."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.outbox import PostgresOutbox

        return PostgresOutbox(place, origin, **options)
    return SQLiteOutbox(place, origin, **options)


def bring_up_to_date(place: Path | DatabaseURL) -> None:
    """Raise :class:`~perqueue.OutboxMismatch` unless an outbox is there, of whatever origin."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.session import Session

        Session(place, None, create=False).close()
        return
    from perqueue._outbox.connection import set_up

    set_up(place, None, create=False)


def open_as_operator(place: Path | DatabaseURL) -> Operator:
    """Open an existing outbox, whatever origin it belongs to, without delivering anything."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.operator import PostgresOperator

        return PostgresOperator(place, None, create=False)
    from perqueue._outbox.operator import OperatorOutbox

    return OperatorOutbox(place, None, create=False)


def open_trail(place: Path | DatabaseURL) -> Trail:
    """Open the audit trail of an existing outbox."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.trail import PostgresTrail

        return PostgresTrail(place)
    from perqueue._outbox.file_trail import FileTrail

    return FileTrail(place)


def examine_database(url: DatabaseURL, now: int, known: Known) -> Iterator[tuple[str, Iterator[Finding]]]:
    """Yield groups of findings about an outbox in a database, each with its title."""
    from perqueue._outbox.postgres.examine import examine

    return examine(url, now, known)


def open_to_look(place: Path | DatabaseURL) -> Onlooker:
    """Return who looks at an outbox; raise :class:`~perqueue.OutboxError` if there is none."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.look import PostgresOnlooker

        return PostgresOnlooker(place)
    from perqueue._outbox.look import FileOnlooker

    return FileOnlooker(place)
