"""Durable storage of activities and their outcomes."""

from perqueue._outbox.open import open_outbox
from perqueue._outbox.operator import OperatorOutbox
from perqueue._outbox.protocol import DrainLock, Hold, Key, News, Outbox, Position, Settled
from perqueue._outbox.reader import Reader
from perqueue._outbox.sqlite import SQLiteOutbox
from perqueue._outbox.trail import Filter, Traced, Try, trace, trace_one

__all__ = [
    "DrainLock",
    "Filter",
    "Hold",
    "Key",
    "News",
    "OperatorOutbox",
    "Outbox",
    "Position",
    "Reader",
    "SQLiteOutbox",
    "Settled",
    "Traced",
    "Try",
    "open_outbox",
    "trace",
    "trace_one",
]
