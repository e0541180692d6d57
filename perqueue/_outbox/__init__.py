"""Durable storage of activities and their outcomes."""

from perqueue._outbox.operator import OperatorOutbox
from perqueue._outbox.protocol import Hold, Key, Load, Outbox, Position, Settled
from perqueue._outbox.reader import Reader
from perqueue._outbox.sqlite import SQLiteOutbox
from perqueue._outbox.trail import Filter, Traced, Try, trace, trace_one

__all__ = [
    "Filter",
    "Hold",
    "Key",
    "Load",
    "OperatorOutbox",
    "Outbox",
    "Position",
    "Reader",
    "SQLiteOutbox",
    "Settled",
    "Traced",
    "Try",
    "trace",
    "trace_one",
]
