"""Locks may be held for longer than a second: without a write-ahead log each commit waits for the disk."""

from perqueue._outbox import connection, session, sqlite


def be_patient(replace=setattr):
    """Let this process wait for a lock for as long as a busy disk takes."""
    for module in (connection, session, sqlite):
        replace(module, "BUSY_TIMEOUT", 20.0)
