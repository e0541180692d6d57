"""The bare API: `PerClient`, `AsyncPerClient`, and the reports of a queue."""

import asyncio
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import pytest

from perqueue import (
    ActivityRejected,
    AsyncPerClient,
    AuthenticationError,
    ConfigurationError,
    InvalidActivity,
    PerAPIError,
    PerClient,
    QueueClosed,
    ReportRow,
)
from perqueue.sandbox import (
    BadToken,
    Disconnect,
    Drip,
    HalfBody,
    Hang,
    Html,
    HugeBody,
    OkWithoutResult,
    RateLimited,
    Redirect,
    Refuse,
    ResetBeforeAccepting,
    Status,
    TruncatedJson,
)

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
REPORT = {"ok": True, "result": {"start": None, "end": None, "activityTypes": {}}}


def mock(answer):
    return httpx.MockTransport(lambda _request: answer)


@pytest.fixture
def call(options):
    """Call a method of a client by name, synchronously or not: `call("add_activity", "G", "U")`."""

    def by(kind):
        def with_sync(method, *args, **given):
            with PerClient(**{**options, **given}) as client:
                return getattr(client, method)(*args)

        def with_async(method, *args, **given):
            async def main():
                async with AsyncPerClient(**{**options, **given}) as client:
                    return await getattr(client, method)(*args)

            return asyncio.run(main())

        return with_sync if kind == "sync" else with_async

    return by


@pytest.fixture(params=["sync", "async"])
def use(request, call):
    return call(request.param)


def test_adding_an_activity_returns_its_transaction_id(per, use):
    """One call, one request, one transaction ID."""
    assert use("add_activity", "GROUP_A", "USER_1") == per.activities[0].transaction_id
    assert use("add_activity", "GROUP_A", "USER_1", "OTHER") == per.activities[1].transaction_id
    assert per.activities[1].activity_type_id == "OTHER"
    assert per.requests == 2


def test_a_report_counts_unique_users(per, use):
    """The report is the one that Per gives, with the client's own type for `unique()`."""
    for user in ("A", "B", "A"):
        use("add_activity", "GROUP_A", user)
    report = use("get_report", LONG_AGO)
    assert report.unique("GROUP_A") == 2
    assert report.rows() == [ReportRow(activity_type_id=per.activity_type_id, billing_id="GROUP_A", unique=2)]
    assert report.start == LONG_AGO
    assert use("get_report").rows() == []
    assert use("get_report", LONG_AGO, "2020-12-31T23:59:59.999Z").rows() == []
    assert per.request_log[-1].parameters == {
        "start": "2020-01-01T00:00:00Z",
        "end": "2020-12-31T23:59:59.999Z",
    }


NO_ANSWERS = [
    Html(),
    Html(404),
    TruncatedJson(accept=False),
    Redirect(),
    Status(500),
    Status(204, ""),
    Status(200, "null"),
    RateLimited(60),
    Disconnect(),
    ResetBeforeAccepting(),
    HalfBody(accept=False),
]


@pytest.mark.parametrize("fault", NO_ANSWERS, ids=str)
@pytest.mark.parametrize("method", ["add_activity", "get_report"])
def test_what_is_no_answer_is_an_api_error(per, use, fault, method):
    """Values are returned if and only if Per answered; anything else is `PerAPIError`, nothing of httpx's."""
    per.set_fault(fault, endpoint="both")
    args = ("GROUP_A", "USER_1") if method == "add_activity" else ()
    with pytest.raises(PerAPIError) as caught:
        use(method, *args)
    assert not isinstance(caught.value, AuthenticationError)
    expected = getattr(fault, "code", getattr(fault, "status", 429 if fault.name == "rate_limited" else None))
    if fault.name == "truncated_json":
        expected = 200
    assert caught.value.status == expected
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("method", ["add_activity", "get_report"])
def test_how_long_per_asks_to_wait_is_told(per, use, method):
    """`Retry-After` of an answer is in the exception, for whoever asks again."""
    per.set_fault(RateLimited(retry_after=7), endpoint="both")
    args = ("GROUP_A", "USER_1") if method == "add_activity" else ()
    with pytest.raises(PerAPIError) as caught:
        use(method, *args)
    assert (caught.value.status, caught.value.retry_after) == (429, 7.0)


@pytest.mark.parametrize("method", ["add_activity", "get_report"])
@pytest.mark.parametrize("fault", [Hang(), Drip(0.1), HugeBody(200_000_000)], ids=str)
def test_a_request_ends_at_its_deadline(per, use, fault, method):
    """However the server delays, a call ends at `request_timeout` (invariant 11)."""
    per.set_fault(fault, endpoint="both")
    args = ("GROUP_A", "USER_1") if method == "add_activity" else ()
    began = time.monotonic()
    with pytest.raises(PerAPIError, match=r"no answer within 0\.2 s|more than \d+ bytes"):
        use(method, *args, request_timeout=0.2)
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("status", [200, 401])
def test_a_bad_token_is_an_authentication_error(per, use, status):
    """A refused token is told by its own exception, which is a `PerAPIError` with Per's reason."""
    per.set_fault(BadToken(status), endpoint="both")
    for method, args in (("add_activity", ("GROUP_A", "USER_1")), ("get_report", ())):
        with pytest.raises(AuthenticationError) as caught:
            use(method, *args)
        assert isinstance(caught.value, PerAPIError)
        assert (caught.value.status, caught.value.code) == (status, "invalid_auth_token")


def test_a_token_without_the_scope_is_refused(use, per):
    """The activity token reads no reports, and the other way round."""
    with pytest.raises(AuthenticationError):
        use("get_report", reporting_token=per.activity_token)
    with pytest.raises(AuthenticationError):
        use("add_activity", "GROUP_A", "USER_1", activity_token=per.reporting_token)


def test_a_refusal_is_told_with_its_reason(per, use):
    """Per's own no is `ActivityRejected` for an activity, and `PerAPIError` for a report."""
    per.set_fault(Refuse("no such group", status=400), endpoint="both")
    with pytest.raises(ActivityRejected, match="no such group") as caught:
        use("add_activity", "GROUP_A", "USER_1")
    assert caught.value.reason == "no such group"
    assert caught.value.activities[0].user_id == "USER_1"
    with pytest.raises(PerAPIError, match="no such group") as caught:
        use("get_report")
    assert (caught.value.status, caught.value.code) == (400, "no such group")


@pytest.mark.parametrize(
    "body",
    [
        b'{"ok": true}',
        b'{"ok": true, "result": null}',
        b'{"ok": true, "result": []}',
        b'{"ok": true, "result": {"activityTypes": {"T": null}}}',
        b'{"ok": true, "result": {"activityTypes": {"T": {"billingIds": {"G": null}}}}}',
        b'{"ok": true, "result": {"activityTypes": {"T": {"billingIds": {"G": {}}}}}}',
        b'{"ok": true, "result": {"activityTypes": {"T": {"billingIds": {"G": {"unique": "5"}}}}}}',
        b'{"ok": true, "result": {"activityTypes": 5}}',
        b'{"ok": "true", "result": {"activityTypes": {}}}',
        b'{"result": {"activityTypes": {}}}',
    ],
)
def test_an_answer_that_is_no_report_is_an_error(use, body):
    """A malformed report is never a report with nothing in it: nobody is billed zero by mistake."""
    with pytest.raises(PerAPIError):
        use("get_report", transport=mock(httpx.Response(200, content=body)))


def test_ok_without_result_is_no_report(per, use):
    """`ok: true` and nothing else is an error."""
    per.set_fault(OkWithoutResult(), endpoint="both")
    with pytest.raises(PerAPIError):
        use("get_report")
    with pytest.raises(PerAPIError):
        use("add_activity", "GROUP_A", "USER_1")


def test_wrong_arguments_cost_no_request(per, use):
    """What cannot be sent is refused before anything is."""
    for args in (("", "U"), ("G", None), ("G", "U", "x" * 401), ("G", "U\0")):
        with pytest.raises(InvalidActivity):
            use("add_activity", *args)
    with pytest.raises(InvalidActivity, match="activity_type_id is missing"):
        use("add_activity", "G", "U", activity_type_id=None)
    for dates in ((None, LONG_AGO), (datetime(2020, 1, 1),), ("yesterday",)):  # noqa: DTZ001
        with pytest.raises(ConfigurationError):
            use("get_report", *dates)
    with pytest.raises(ConfigurationError, match="reporting_token is missing"):
        use("get_report", reporting_token=None)
    with pytest.raises(ConfigurationError, match="activity_token is missing"):
        use("add_activity", "G", "U", activity_token=None)
    assert per.requests == 0


def test_a_mock_transport_serves_both_endpoints(use):
    """Tests of other programs need no server: any `httpx.AsyncBaseTransport` will do."""

    def answer(request):
        if request.url.path == "/reports.get":
            return httpx.Response(200, json=REPORT)
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "t1"}})

    transport = httpx.MockTransport(answer)
    assert use("add_activity", "G", "U", transport=transport, base_url=None) == "t1"
    assert use("get_report", transport=transport, base_url=None).rows() == []


def test_a_queue_with_a_mock_transport_delivers_and_reports(make_queue):
    """The transport of a queue serves delivery and both ways to get a report."""

    async def answer(request):
        if request.url.path == "/reports.get":
            return httpx.Response(200, json=REPORT)
        return httpx.Response(
            200, json={"ok": True, "result": {"transactionId": request.url.params["userId"]}}
        )

    queue = make_queue(transport=httpx.MockTransport(answer), base_url=None)
    assert queue.record("GROUP_A", "USER_1").wait(5) == "USER_1"
    assert queue.get_report().rows() == []
    assert asyncio.run(queue.aget_report()).rows() == []


def test_a_report_of_a_queue(per, make_queue):
    """`get_report()` is a synchronous pass-through: what is delivered is in it."""
    queue = make_queue()
    for user in ("A", "B"):
        queue.record("GROUP_A", user)
    queue.flush(5)
    assert queue.get_report(LONG_AGO).unique("GROUP_A") == 2
    assert asyncio.run(queue.aget_report(LONG_AGO)).unique("GROUP_A") == 2


def test_a_synchronous_call_works_inside_a_running_loop(per, make_queue, options):
    """`get_report()` and `PerClient` may be called from a coroutine, where they block like any function."""
    queue = make_queue()

    async def main():
        with PerClient(**options) as client:
            client.add_activity("GROUP_A", "USER_1")
            return queue.get_report(LONG_AGO), client.get_report(LONG_AGO), await queue.aget_report(LONG_AGO)

    assert [report.unique("GROUP_A") for report in asyncio.run(main())] == [1, 1, 1]


def test_many_threads_share_a_client(per, options):
    """A client may be shared: calls run at a time, and each gets its own answer."""
    with PerClient(**options) as client, ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda number: client.add_activity("GROUP_A", f"USER_{number}"), range(40)))
    by_id = {activity.transaction_id: activity.user_id for activity in per.activities}
    assert [by_id[each] for each in ids] == [f"USER_{number}" for number in range(40)]


def test_many_tasks_share_an_async_client(per, options):
    """Concurrent calls of one client each have their own connection and answer."""

    async def main():
        async with AsyncPerClient(**options) as client:
            return await asyncio.gather(*(client.add_activity("GROUP_A", f"USER_{n}") for n in range(40)))

    ids = asyncio.run(main())
    by_id = {activity.transaction_id: activity.user_id for activity in per.activities}
    assert [by_id[each] for each in ids] == [f"USER_{number}" for number in range(40)]


def test_a_closed_client_says_so(options):
    """After `close()`, which may be repeated, a call is `QueueClosed`."""
    client = PerClient(**options)
    client.add_activity("GROUP_A", "USER_1")
    client.close()
    client.close()
    with pytest.raises(QueueClosed):
        client.add_activity("GROUP_A", "USER_1")
    PerClient(**options).close()


def test_closing_waits_for_nobodys_report(per, make_queue):
    """What other threads are asking ends with the queue, at once, and says so."""
    per.set_fault(Hang(), endpoint="reports.get")
    queue = make_queue(request_timeout=60)
    with ThreadPoolExecutor(3) as pool:
        reports = [pool.submit(queue.get_report, LONG_AGO) for _ in range(3)]
        per.wait_for_requests(3)
        began = time.monotonic()
        queue.close()
        assert time.monotonic() - began < 4
        for report in reports:
            with pytest.raises(QueueClosed):
                report.result(5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_out_of_a_transport_ends_one_call(options, error):
    """Whoever called is told, and the next call is answered: the loop they share goes on."""
    tries = []

    def answer(request):
        tries.append(request)
        if len(tries) == 1:
            raise error
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "t"}})

    with PerClient(**options, transport=httpx.MockTransport(answer)) as client:
        with pytest.raises(error):
            client.add_activity("GROUP_A", "USER_1")
        assert client.add_activity("GROUP_A", "USER_1") == "t"


def test_a_client_that_is_dropped_stops_its_thread(per, options, until):
    """Without `close()`, the thread ends when the client is collected."""
    client = PerClient(**options)
    client.add_activity("GROUP_A", "USER_1")
    del client
    gc.collect()
    until(lambda: "perqueue-client" not in [thread.name for thread in threading.enumerate()])


def test_ten_threads_may_close_a_client_at_once(options):
    """Closing from many threads raises nothing."""
    client = PerClient(**options)
    client.add_activity("GROUP_A", "USER_1")
    barrier = threading.Barrier(10)

    def close(_number):
        barrier.wait(5)
        client.close()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(close, range(10)))


def test_a_clients_repr_shows_where_it_asks(options, per):
    """The repr names the server, and no token (invariant 9)."""
    with PerClient(**options) as client:
        assert repr(client) == f"<PerClient {per.url}>"
        assert per.activity_token not in repr(client._client._settings)


def test_a_rotated_token_is_asked_for_each_call(per, options):
    """A callable is asked anew for each request, so that a rotated token works at once."""
    tokens = ["wrong"]
    with PerClient(**{**options, "activity_token": lambda: tokens[0]}) as client:
        with pytest.raises(AuthenticationError):
            client.add_activity("GROUP_A", "USER_1")
        tokens[0] = per.activity_token
        client.add_activity("GROUP_A", "USER_1")
    assert per.accepted == 1
