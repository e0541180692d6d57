"""Uses the public API as programs do; never run, only checked by mypy in strict mode."""

from __future__ import annotations

import asyncio
import sqlite3
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type

import httpx
from opentelemetry.metrics import get_meter_provider

import perqueue
from perqueue import (
    Activity,
    ActivityRecord,
    ActivityRejected,
    AsyncPerClient,
    Attempt,
    AuthenticationError,
    ConfigurationError,
    DrainState,
    FlushTimeout,
    InvalidActivity,
    OutboxError,
    OutboxFull,
    OutboxMismatch,
    PerAPIError,
    PerClient,
    PerQueue,
    PerQueueError,
    QueueClosed,
    Receipt,
    Reconciliation,
    ReconciliationRow,
    Report,
    ReportRow,
    RetryPolicy,
    Stats,
)
from perqueue.testing import (
    LocalPer,
    assert_delivered,
    assert_recorded,
    sandbox_environment,
    sandbox_queue,
)

if TYPE_CHECKING:
    from collections.abc import Callable

assert_type(perqueue.__version__, str)


def token() -> str:
    return "from a vault"


def on_record_error(error: OutboxError) -> None:
    activity: Activity | None = error.activity
    print(activity)


def on_rejected(activity: Activity) -> None:
    assert_type(activity.id, int)
    assert_type(activity.billing_id, str)
    assert_type(activity.user_id, str)
    assert_type(activity.activity_type_id, str)
    assert_type(activity.recorded_at, int)
    assert_type(activity.reason, str | None)


def on_stalled(stats: Stats) -> None:
    assert_type(stats.pending, int)
    assert_type(stats.oldest_pending_age, float | None)
    assert_type(stats.delivered, int)
    assert_type(stats.rejected, int)
    assert_type(stats.in_flight, int)
    assert_type(stats.state, DrainState)
    assert_type(stats.reason, str | None)
    assert_type(stats.resumes_at, datetime | None)


def every_option() -> PerQueue:
    return PerQueue(
        Path("activities.db"),
        activity_token=token,
        activity_type_id="ACTIVITY_TYPE_ID",
        reporting_token="from the environment",
        base_url="https://api.useper.com",
        drain=True,
        max_in_flight=32,
        durability="power",
        keep_delivered=timedelta(days=35),
        max_pending=10_000_000,
        flush_timeout=None,
        exit_timeout=2,
        request_timeout=10,
        retry=RetryPolicy(base=0.5, cap=60, retry_after_cap=300, activity_cap=900),
        proxy="http://proxy.example:3128",
        verify=ssl.create_default_context(),
        transport=httpx.MockTransport(lambda request: httpx.Response(200, request=request)),
        on_record_error=on_record_error,
        on_rejected=on_rejected,
        on_stalled=on_stalled,
        stalled_after=300,
        meter_provider=get_meter_provider(),
    )


def a_hot_path(queue: PerQueue) -> None:
    queue.record("GROUP_A", "USER_1")
    queue.record(billing_id="GROUP_A", user_id="USER_1", activity_type_id="OTHER")
    assert_type(queue.record("GROUP_A", "USER_1", connection=sqlite3.connect("app.db")), Receipt)
    receipt = queue.record("GROUP_A", "USER_2")
    assert_type(receipt, Receipt)
    assert_type(receipt.id, int)
    assert_type(receipt.wait(), str)
    assert_type(receipt.wait(timeout=5), str)
    assert_type(receipt.wait(None), str)


def a_shutdown(queue: PerQueue) -> None:
    queue.flush()
    queue.flush(timeout=30)
    queue.flush(timeout=0.5)
    queue.flush(None)
    assert_type(queue.stats(), Stats)
    queue.close()


def a_block() -> None:
    with PerQueue("activities.db", activity_token="…") as queue:
        assert_type(queue, PerQueue)


async def asynchronously() -> None:
    async with PerQueue("activities.db", activity_token="…") as queue:
        assert_type(queue, PerQueue)
        assert_type(await queue.record("GROUP_A", "USER_1"), str)
        first, second = await asyncio.gather(
            queue.record("GROUP_A", "USER_1"), queue.record("GROUP_A", "USER_2")
        )
        assert_type(first, str)
        assert_type(second, str)
        assert_type(await queue.arecord("GROUP_A", "USER_1", connection=object()), Receipt)
        assert_type(await asyncio.wait_for(queue.record("GROUP_A", "USER_3"), 5), str)
        await queue.aflush()
        await queue.aflush(timeout=30)
        await queue.aflush(None)
        assert_type(await queue.aget_report("2018-12-01T00:00:00Z"), Report)
        await queue.aclose()


def a_report(queue: PerQueue) -> None:
    start = datetime(2018, 12, 1, tzinfo=UTC)
    assert_type(queue.get_report(), Report)
    report = queue.get_report(start, "2018-12-31T23:59:59.999Z")
    assert_type(report.unique("GROUP_A"), int)
    assert_type(report.unique("GROUP_A", activity_type_id="ACTIVITY_TYPE_ID"), int)
    assert_type(report.rows(), list[ReportRow])
    assert_type(report.raw, dict[str, Any])
    assert_type(report.start, datetime | None)
    assert_type(report.end, datetime | None)
    for row in report.rows():
        assert_type((row.activity_type_id, row.billing_id, row.unique), tuple[str, str, int])


def an_audit(queue: PerQueue) -> None:
    start = datetime(2018, 12, 1, tzinfo=UTC)
    assert_type(queue.history(), list[ActivityRecord])
    assert_type(queue.attempts(1), list[Attempt])
    records = queue.history(user_id="USER_1", billing_id="GROUP_A", since=start, limit=None)
    for record in records:
        assert_type((record.id, record.billing_id, record.user_id), tuple[int, str, str])
        assert_type((record.recorded_at, record.settled_at), tuple[datetime, datetime | None])
        assert_type((record.transaction_id, record.reason), tuple[str | None, str | None])
    reconciliation = queue.reconcile(start, "2018-12-31T23:59:59.999Z")
    assert_type(reconciliation, Reconciliation)
    assert_type(reconciliation.complete, bool)
    assert_type(reconciliation[0], ReconciliationRow)
    for row in reconciliation:
        assert_type((row.per_unique, row.late, row.note), tuple[int, int, str])


def the_bare_api() -> None:
    with PerClient(activity_token="…", reporting_token=token, request_timeout=5) as client:
        assert_type(client, PerClient)
        assert_type(client.add_activity("GROUP_A", "USER_1", "ACTIVITY_TYPE_ID"), str)
        assert_type(client.get_report(), Report)
        client.close()


async def the_bare_api_asynchronously() -> None:
    async with AsyncPerClient(activity_token="…", activity_type_id="ACTIVITY_TYPE_ID") as client:
        assert_type(client, AsyncPerClient)
        assert_type(await client.add_activity("GROUP_A", "USER_1"), str)
        assert_type(await client.get_report(datetime(2018, 12, 1, tzinfo=UTC)), Report)
        await client.aclose()


def every_exception(attempt: Callable[[], None]) -> None:
    try:
        attempt()
    except (OutboxFull, OutboxMismatch, ConfigurationError, InvalidActivity, QueueClosed) as error:
        assert_type(str(error), str)
    except OutboxError as error:
        assert_type(error.activity, Activity | None)
    except FlushTimeout as error:
        assert_type(error.pending, int)
        assert_type(error.reason, str | None)
    except ActivityRejected as error:
        assert_type(error.reason, str | None)
        assert_type(error.activities, tuple[Activity, ...])
    except AuthenticationError as error:
        assert_type(error.code, str | None)
    except PerAPIError as error:
        assert_type(error.status, int | None)
        assert_type(error.code, str | None)
    except PerQueueError:
        raise


def as_standard_exceptions(attempt: Callable[[], None]) -> None:
    value_errors: tuple[type[ValueError], ...] = (ConfigurationError, InvalidActivity)
    timeout: type[TimeoutError] = FlushTimeout
    try:
        attempt()
    except value_errors:
        pass
    except timeout:
        pass


def in_tests() -> None:
    with sandbox_queue(coalesce=None) as (queue, per):
        assert_type(queue, PerQueue)
        assert_type(per, LocalPer)
        with per.outage():
            assert_recorded(queue, user_id="USER_1", times=0)
        assert_delivered(per, billing_id="GROUP_A", timeout=1)
    with sandbox_environment() as per:
        assert_recorded()


# What must not pass the type checker: an unused ignore is an error in strict mode.
def mistakes(queue: PerQueue) -> None:
    queue.record("GROUP_A")  # type: ignore[call-arg]
    queue.record("GROUP_A", 7)  # type: ignore[arg-type]
    queue.record("GROUP_A", None)  # type: ignore[arg-type]
    queue.record("GROUP_A", "USER_1", "ACTIVITY_TYPE_ID")  # type: ignore[call-arg]
    queue.flush("soon")  # type: ignore[arg-type]
    queue.get_report(2018)  # type: ignore[arg-type]
    PerQueue("activities.db", "token")  # type: ignore[call-arg]
    PerQueue("activities.db", durability="disk")  # type: ignore[arg-type]
    PerQueue("activities.db", activity_tokn="…")  # type: ignore[call-arg]
    PerQueue("activities.db", on_rejected=on_stalled)  # type: ignore[arg-type]
    PerQueue("activities.db", meter_provider="prometheus")  # type: ignore[arg-type]
    RetryPolicy(0.5)  # type: ignore[call-arg]
    queue.stats().pending = 0  # type: ignore[misc]
