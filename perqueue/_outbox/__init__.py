"""Durable storage of activities and their outcomes."""

from perqueue._outbox.open import (
    Onlooker,
    Operator,
    bring_up_to_date,
    examine_database,
    open_as_operator,
    open_outbox,
    open_to_look,
    open_trail,
)
from perqueue._outbox.operator import OperatorOutbox
from perqueue._outbox.protocol import DrainLock, Hold, Key, Load, News, Outbox, Position, Settled
from perqueue._outbox.sqlite import SQLiteOutbox
from perqueue._outbox.trail import Filter, Traced, Try

__all__ = [
    "DrainLock",
    "Filter",
    "Hold",
    "Key",
    "Load",
    "News",
    "Onlooker",
    "Operator",
    "OperatorOutbox",
    "Outbox",
    "Position",
    "SQLiteOutbox",
    "Settled",
    "Traced",
    "Try",
    "bring_up_to_date",
    "examine_database",
    "open_as_operator",
    "open_outbox",
    "open_to_look",
    "open_trail",
]
