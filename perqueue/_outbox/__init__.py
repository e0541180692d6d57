"""Durable storage of activities and their outcomes."""

from perqueue._outbox.operator import OperatorOutbox
from perqueue._outbox.protocol import Hold, Key, Outbox, Position, Settled
from perqueue._outbox.sqlite import SQLiteOutbox

__all__ = [
    "Hold",
    "Key",
    "OperatorOutbox",
    "Outbox",
    "Position",
    "SQLiteOutbox",
    "Settled",
]
