"""Opening an outbox, whatever it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perqueue._address import DatabaseURL
from perqueue._outbox.sqlite import SQLiteOutbox

if TYPE_CHECKING:
    from pathlib import Path

    from perqueue._outbox.protocol import Outbox


def open_outbox(place: Path | DatabaseURL, origin: str | None, **options: Any) -> Outbox:
    """Open, or create, the outbox of a file or a database; options as :class:`SQLiteOutbox` has them."""
    if isinstance(place, DatabaseURL):
        from perqueue._outbox.postgres.outbox import PostgresOutbox

        return PostgresOutbox(place, origin, **options)
    return SQLiteOutbox(place, origin, **options)
