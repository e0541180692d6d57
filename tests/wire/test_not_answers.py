"""What happens when what comes back is not an answer of Per's, over real sockets."""

import asyncio
import threading
import time
import tracemalloc

import httpx
import pytest

from perqueue import AuthenticationError, FlushTimeout, PerAPIError, PerClient
from perqueue._activity import Activity, Verdict
from perqueue._settings import resolve_client_settings
from perqueue._wire.exchange import Wire
from perqueue.sandbox import (
    CloseAfterAnswer,
    Disconnect,
    Drip,
    HalfBody,
    Hang,
    Html,
    HugeBody,
    Latency,
    OkWithoutResult,
    RateLimited,
    Redirect,
    Refuse,
    ResetAfterAccepting,
    ResetBeforeAccepting,
    ResultId,
    Status,
    TruncatedJson,
)
from tests.helpers import quickest

NO_ANSWERS = [
    Html(404),
    Html(200),
    Html(502),
    TruncatedJson(),
    TruncatedJson(accept=False),
    Redirect(),
    Redirect(status=308),
    OkWithoutResult(),
    Status(500),
    Status(500, '{"ok": false, "message": "no such group"}', "application/json"),
    Status(502),
    Status(504),
    Status(204, ""),
    Status(413, "<html>too large</html>", "text/html"),
    Status(408),
    RateLimited(),
    Refuse("rate_limited"),
    ResetBeforeAccepting(),
    ResetAfterAccepting(),
    Disconnect(),
    HalfBody(),
    HalfBody(accept=False),
    HugeBody(10_000_000),
]


@pytest.mark.parametrize("fault", NO_ANSWERS, ids=str)
def test_what_is_no_answer_leaves_the_activity_pending(per, make_queue, fault):
    """Flush raises in time, the activity is kept, and arrives once the server is well (invariants 2, 3,
    4).
    """
    per.set_fault(fault)
    queue = make_queue()
    receipt = queue.record("GROUP_A", "USER_1")
    per.wait_for_requests(1)
    began = time.monotonic()
    with pytest.raises(FlushTimeout) as caught:
        queue.flush(timeout=0.15)
    assert 0.15 <= time.monotonic() - began < 2
    assert caught.value.pending == 1
    assert isinstance(caught.value, TimeoutError)
    assert (queue.stats().pending, queue.stats().rejected, queue.stats().delivered) == (1, 0, 0)
    per.clear_faults()
    assert receipt.wait(5) == per.activities[-1].transaction_id
    assert (queue.stats().pending, queue.stats().delivered) == (0, 1)
    assert per.unique("GROUP_A") == 1


def test_flush_keeps_its_time_to_the_half_second(per, make_queue):
    """`flush(timeout=2)` raises within 2.5 seconds, and says how many are pending and why (invariant 4)."""
    per.set_fault(Html(404))
    queue = make_queue()
    for number in range(3):
        queue.record("GROUP_A", f"USER_{number}")

    def flush():
        with pytest.raises(FlushTimeout, match=r"3 activities are .* after 2 s.*HTTP 404") as caught:
            queue.flush(timeout=2)
        assert caught.value.pending == 3
        assert "HTTP 404" in caught.value.reason

    assert 2 <= quickest(flush, 2.5) < 2.5


def test_a_server_that_hangs_holds_up_nobody_beyond_the_deadline(per, make_queue, until):
    """A request that is never answered ends at `request_timeout`,
    and the activity is sent again (invariant 11).
    """
    per.set_fault(Hang())
    queue = make_queue(request_timeout=0.5)
    receipt = queue.record("GROUP_A", "USER_1")

    def flush():
        with pytest.raises(FlushTimeout):
            queue.flush(timeout=0.2)

    assert quickest(flush, 0.5) < 0.5
    until(lambda: queue.stats().reason == "no answer within 0.5 s")
    per.clear_faults()
    per.release()
    assert receipt.wait(5) == per.activities[-1].transaction_id


def test_an_answer_that_drips_meets_a_true_deadline(per, make_queue, until):
    """An answer that comes byte by byte ends at `request_timeout`, however lively it is (invariant 11)."""
    per.set_fault(Drip(0.05))
    queue = make_queue(request_timeout=0.5, exit_timeout=0.1)
    queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().reason == "no answer within 0.5 s")
    with PerClient(base_url=per.url, activity_token=per.activity_token, request_timeout=0.5) as client:
        began = time.monotonic()
        with pytest.raises(PerAPIError, match=r"no answer within 0\.5 s"):
            client.add_activity("GROUP_A", "USER_1", "TYPE")
        assert 0.5 <= time.monotonic() - began < 3


def test_an_endless_answer_fills_no_memory(per, options):
    """Of a body of 100 MB only what can be an answer is read (invariant 12)."""
    per.set_fault(HugeBody(100_000_000))
    with PerClient(**options) as client:
        tracemalloc.start()
        try:
            with pytest.raises(PerAPIError, match="more than 65536 bytes"):
                client.add_activity("GROUP_A", "USER_1")
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8_000_000


@pytest.mark.parametrize("fault", [ResultId(), CloseAfterAnswer(), Latency(0.05)], ids=str)
def test_an_answer_in_an_odd_form_is_an_answer(per, make_queue, fault):
    """`result.id`, a connection that closes after the answer, a slow answer: all are accepted."""
    per.set_fault(fault)
    queue = make_queue()
    receipts = [queue.record("GROUP_A", f"USER_{number}") for number in range(20)]
    queue.flush(5)
    ids = {activity.transaction_id for activity in per.activities}
    assert {receipt.wait(0) for receipt in receipts} == ids
    assert per.accepted == 20


def test_a_compressed_answer_is_not_pers(make_queue):
    """An encoding that was not asked for is not an answer, and is not unpacked (invariants 2, 12)."""

    def answer(request):
        assert request.headers["Accept-Encoding"] == "identity"
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"\x1f\x8b"))

    queue = make_queue(transport=httpx.MockTransport(answer))
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(FlushTimeout, match="compressed, though that was not asked for"):
        queue.flush(timeout=0.3)


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("garbage"),
        httpx.LocalProtocolError("our own mistake"),
        httpx.InvalidURL("odd"),
        UnicodeEncodeError("ascii", "é", 0, 1, "no"),
        OSError(24, "too many open files"),
        MemoryError(),
        RuntimeError("whatever"),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_failure_of_the_network_leaves_the_activity_pending(make_queue, error):
    """Whatever a transport raises is no answer, and kills no worker (invariants 2, 8)."""
    well = False

    def answer(_request):
        if not well:
            raise error
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "t1"}})

    queue = make_queue(transport=httpx.MockTransport(answer))
    receipt = queue.record("GROUP_A", "USER_1")
    with pytest.raises(FlushTimeout):
        queue.flush(timeout=0.1)
    assert queue.stats().pending == 1
    well = True
    assert receipt.wait(5) == "t1"


def test_a_host_name_that_cannot_be_looked_up_is_no_answer(make_queue):
    """A name that no resolver takes is a failure like any other: the activity is kept (invariant 3)."""
    queue = make_queue(base_url=f"https://{'x' * 64}.example")
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(FlushTimeout):
        queue.flush(timeout=0.3)
    assert queue.stats().pending == 1


ACTIVITY = Activity(id=1, billing_id="GROUP_A", user_id="USER_1", activity_type_id="TYPE", recorded_at=0)
NOT_ERRORS = [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), asyncio.CancelledError(), BaseException()]


def wire_with(**given):
    """Return what sends single requests, to nobody."""
    options = {
        "activity_token": "token-1",
        "reporting_token": "token-2",
        "activity_type_id": None,
        "base_url": "http://127.0.0.1:9",
        "request_timeout": 5,
        "proxy": None,
        "verify": True,
        "transport": None,
    }
    return Wire(resolve_client_settings(**{**options, **given}))


@pytest.mark.parametrize("error", NOT_ERRORS, ids=lambda error: type(error).__name__)
def test_what_is_not_even_an_error_is_an_outcome(error):
    """Whatever a given transport raises, a cancellation of its own too, is no answer (invariant 8)."""

    def answer(_request):
        raise error

    async def main():
        outcome = await wire_with(transport=httpx.MockTransport(answer)).deliver(ACTIVITY)
        assert outcome.verdict is Verdict.NO_ANSWER
        assert type(error).__name__ in outcome.reason

    asyncio.run(main())


@pytest.mark.parametrize("error", NOT_ERRORS, ids=lambda error: type(error).__name__)
def test_what_a_token_callable_raises_is_an_outcome(error):
    """Whatever a token's callable raises, the token is not to be had, and nothing else ends (invariant 7)."""

    def token():
        raise error

    async def main():
        wire = wire_with(activity_token=token, reporting_token=token)
        outcome = await wire.deliver(ACTIVITY)
        assert outcome.verdict is Verdict.BAD_TOKEN
        assert outcome.reason == f"the activity_token callable raised {type(error).__name__}"
        with pytest.raises(AuthenticationError, match="the reporting_token callable raised"):
            await wire.report({})
        await wire.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("in_token", [False, True], ids=["in the transport", "in the token callable"])
def test_a_cancellation_is_a_cancellation(in_token):
    """Whoever cancels a delivery cancels it: only that is no outcome."""
    asked, release = threading.Event(), threading.Event()

    def token():
        asked.set()
        release.wait(10)
        return "token-1"

    async def hang(_request):
        asked.set()
        await asyncio.Event().wait()

    async def main():
        how = {"activity_token": token} if in_token else {"transport": httpx.MockTransport(hang)}
        wire = wire_with(**how)
        task = asyncio.create_task(wire.deliver(ACTIVITY))
        assert await asyncio.to_thread(asked.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        await wire.aclose()

    asyncio.run(main())


def test_a_token_callable_that_blocks_holds_up_nothing(per, make_queue, until):
    """A vault that does not answer delays no deadline and no `close()`, and is named (invariants 7, 11)."""
    release = threading.Event()

    def token():
        release.wait(30)
        return per.activity_token

    queue = make_queue(activity_token=token, request_timeout=0.3, exit_timeout=0.1)
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(AuthenticationError, match=r"activity_token callable has not returned within 0\.3 s"):
        queue.flush(timeout=5)
    began = time.monotonic()
    queue.close()
    assert time.monotonic() - began < 2
    release.set()
    with make_queue(activity_token=token) as again:
        again.flush(10)
    assert per.accepted == 1


def test_a_slow_token_callable_is_asked_for_many_at_once(per, make_queue):
    """Requests that ask while a call is under way share the next: a slow vault is no queue, and no pause."""
    calls = []

    def token():
        calls.append(time.monotonic())
        time.sleep(0.1)
        return per.activity_token

    queue = make_queue(activity_token=token)
    for number in range(60):
        queue.record("GROUP_A", f"USER_{number}")
    queue.flush(20)
    assert per.accepted == per.requests == 60
    assert len(calls) < 30


def test_a_token_callable_that_recovers_is_asked_again(per, make_queue, until):
    """Once the vault answers, delivery goes on by itself, and nobody asked it meanwhile (invariant 7)."""
    asked, release = [], threading.Event()

    def token():
        asked.append(threading.current_thread().name)
        release.wait(30)
        return per.activity_token

    queue = make_queue(activity_token=token, request_timeout=0.2, max_in_flight=8)
    for number in range(20):
        queue.record("GROUP_A", f"USER_{number}")
    until(lambda: "has not returned" in (queue.stats().reason or ""))
    assert len(asked) == 1
    release.set()
    queue.flush(20)
    assert per.accepted == 20
    assert set(asked) == {"perqueue-token"}


def test_a_token_callable_shares_the_requests_deadline(per):
    """Asking for a token is part of the request, and of its time (invariant 11)."""
    per.set_fault(Hang())

    def token():
        time.sleep(0.6)
        return per.activity_token

    options = {"base_url": per.url, "activity_token": token, "activity_type_id": "TYPE"}
    with PerClient(**options, request_timeout=0.8) as client:

        def add():
            with pytest.raises(PerAPIError, match=r"within 0\.8 s"):
                client.add_activity("GROUP_A", "USER_1")

        assert 0.8 <= quickest(add, 1.3) < 1.3  # 0.6 s for the token, then 0.8 s, would be more
    per.release()
