"""perqueue: the buffered background activity recorder for Per.

>>> from perqueue import PerQueue
>>> queue = PerQueue("activities.db", activity_token="…", activity_type_id="…")  # doctest: +SKIP
>>> queue.record(billing_id="GROUP_A", user_id="USER_1")  # doctest: +SKIP
>>> queue.flush()  # doctest: +SKIP
"""

import logging as _logging

from perqueue._activity import Activity
from perqueue._audit import ActivityRecord, Attempt
from perqueue._client import AsyncPerClient, PerClient
from perqueue._receipt import Receipt
from perqueue._reconcile import Reconciliation, ReconciliationRow
from perqueue._recorder import PerQueue
from perqueue._report import Report, ReportRow
from perqueue._settings import RetryPolicy
from perqueue._stats import DrainState, Stats
from perqueue._version import __version__
from perqueue.exceptions import (
    ActivityRejected,
    AuthenticationError,
    ConfigurationError,
    FlushTimeout,
    InvalidActivity,
    OutboxError,
    OutboxFull,
    OutboxMismatch,
    PerAPIError,
    PerQueueError,
    QueueClosed,
)

_logging.getLogger("perqueue").addHandler(_logging.NullHandler())

__all__ = [
    "Activity",
    "ActivityRecord",
    "ActivityRejected",
    "AsyncPerClient",
    "Attempt",
    "AuthenticationError",
    "ConfigurationError",
    "DrainState",
    "FlushTimeout",
    "InvalidActivity",
    "OutboxError",
    "OutboxFull",
    "OutboxMismatch",
    "PerAPIError",
    "PerClient",
    "PerQueue",
    "PerQueueError",
    "QueueClosed",
    "Receipt",
    "Reconciliation",
    "ReconciliationRow",
    "Report",
    "ReportRow",
    "RetryPolicy",
    "Stats",
    "__version__",
]
