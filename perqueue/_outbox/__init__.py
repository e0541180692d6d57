"""Durable storage of activities and their outcomes."""

from perqueue._outbox.look import NEWEST, Look, Onlooker, Request
from perqueue._outbox.operator import OperatorOutbox
from perqueue._outbox.protocol import Hold, Key, Outbox, Position, Settled
from perqueue._outbox.sqlite import SQLiteOutbox

__all__ = [
    "NEWEST",
    "Hold",
    "Key",
    "Look",
    "Onlooker",
    "OperatorOutbox",
    "Outbox",
    "Position",
    "Request",
    "SQLiteOutbox",
    "Settled",
]
