"""A local Per with faults on demand, for tests, demonstrations and development.

::

    from perqueue.sandbox import Sandbox, Status

    with Sandbox() as per:
        per.set_fault(Status(503), times=2)
        ...  # let something deliver to per.url with per.activity_token
        per.wait_for(1)
        per.unique("GROUP_A")

It knows nothing but the wire, so it serves any client of Per, in any language. See ``Sandbox`` for what it
offers, and ``describe_faults()`` for what can go wrong. It also takes commands under ``/_sandbox/``.
"""

from perqueue.sandbox._bad_answers import (
    BadToken,
    Html,
    OkWithoutResult,
    RateLimit,
    RateLimited,
    Redirect,
    Refuse,
    ResultId,
    Status,
    TruncatedJson,
)
from perqueue.sandbox._bad_lines import (
    CloseAfterAnswer,
    Disconnect,
    Drip,
    HalfBody,
    Hang,
    HugeBody,
    Latency,
    ResetAfterAccepting,
    ResetBeforeAccepting,
)
from perqueue.sandbox._catalog import FaultDescription, describe_faults, make_fault
from perqueue.sandbox._fault import Fault
from perqueue.sandbox._fault_book import ActivityParameters
from perqueue.sandbox._ledger import ReceivedActivity, RequestSeen
from perqueue.sandbox._run import run
from perqueue.sandbox._server import Sandbox

__all__ = [
    "ActivityParameters",
    "BadToken",
    "CloseAfterAnswer",
    "Disconnect",
    "Drip",
    "Fault",
    "FaultDescription",
    "HalfBody",
    "Hang",
    "Html",
    "HugeBody",
    "Latency",
    "OkWithoutResult",
    "RateLimit",
    "RateLimited",
    "ReceivedActivity",
    "Redirect",
    "Refuse",
    "RequestSeen",
    "ResetAfterAccepting",
    "ResetBeforeAccepting",
    "ResultId",
    "Sandbox",
    "Status",
    "TruncatedJson",
    "describe_faults",
    "make_fault",
    "run",
]
