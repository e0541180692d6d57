"""Telling what a damaged file says from what was written to it."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Sequence

_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


ROW_IS_MISSING = "a row that must be there is missing"


def corrupt(message: str) -> sqlite3.DatabaseError:
    """Return SQLite's own error for a damaged file, for damage that SQLite does not notice."""
    error = sqlite3.DatabaseError(message)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_corrupt(error: BaseException | None) -> bool:
    """Tell whether an error says that the file is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _CODES


def one_row(connection: sqlite3.Connection, query: str, values: Sequence[object] = ()) -> tuple[Any, ...]:
    """Return the one row that there must be."""
    row: tuple[Any, ...] | None = connection.execute(query, values).fetchone()
    if row is None:
        raise corrupt(ROW_IS_MISSING)
    return row


def settlement_checksum(
    activity_id: int, state: int, settled_at: int, transaction_id: str | None, reason: str | None
) -> int:
    """Return the CRC-32 that is stored beside an outcome, so that none is believed that is not Per's."""
    text = f"{activity_id}\0{int(state)}\0{settled_at}\0{transaction_id}\0{reason}"
    return crc32(text.encode("utf-8", "surrogateescape"))


def is_sound(outcome: Sequence[Any]) -> bool:
    """Tell whether an outcome is the one that was stored.

    It consists of activity ID, state, time, transaction ID, reason and checksum, as they were read.
    """
    activity_id, state, settled_at, transaction_id, reason, check = outcome
    # Written out: isinstance(text, str | None) takes several times as long, and a bill has millions.
    texts = (transaction_id is None or isinstance(transaction_id, str)) and (
        reason is None or isinstance(reason, str)
    )
    if not (texts and isinstance(state, int) and isinstance(settled_at, int)):
        return False
    return bool(check == settlement_checksum(activity_id, state, settled_at, transaction_id, reason))
