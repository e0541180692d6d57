"""A token that Per refuses: delivery pauses, everything is kept, and goes on by itself."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import httpx
import pytest

from perqueue import AuthenticationError, DrainState, FlushTimeout, Receipt
from perqueue._lock import drain_lock, is_drained
from perqueue.sandbox import BadToken, Hang
from tests.helpers import quickest


class Vault:
    """A store of secrets that hands out one token, until it is rotated."""

    def __init__(self, token):
        self.token = token
        self.asked = 0

    def __call__(self):
        self.asked += 1
        if isinstance(self.token, Exception):
            raise self.token
        return self.token


class Gate(httpx.AsyncBaseTransport):
    """A Per that looks at the token when a request comes, and answers when it likes."""

    def __init__(self):
        self.is_shut = True
        self.is_slow = False
        self.requests = 0

    async def handle_async_request(self, request):
        self.requests += 1
        answer = httpx.Response(200, json={"ok": True, "result": {"transactionId": "T"}})
        if self.is_shut:
            answer = httpx.Response(401, json={"ok": False, "message": "invalid_auth_token"})
        while self.is_slow:  # noqa: ASYNC110 - a test in another thread changes it
            await asyncio.sleep(0.005)
        return answer


def record(queue, count):
    for number in range(count):
        queue.record("GROUP_A", f"USER_{number}")


def test_a_wrong_token_is_told_at_once_and_keeps_everything(per, make_queue, caplog):
    """Within 2 s and a dozen requests flush raises; all is kept,
    and the right token delivers it (invariant 7).
    """
    vault = Vault("wrong")
    queue = make_queue(activity_token=vault)
    with caplog.at_level(logging.DEBUG, "perqueue"):
        record(queue, 100)

        def flush():
            with pytest.raises(AuthenticationError, match="invalid_auth_token") as caught:
                queue.flush(timeout=30)
            assert caught.value.code == "invalid_auth_token"

        assert quickest(flush, 2) < 2
    assert per.requests <= 12
    stats = queue.stats()
    assert (stats.pending, stats.rejected, stats.delivered) == (100, 0, 0)
    assert stats.state is DrainState.PAUSED
    assert "invalid_auth_token" in stats.reason
    assert stats.resumes_at is not None
    assert len([entry for entry in caplog.records if entry.levelno >= logging.WARNING]) == 1
    vault.token = per.activity_token
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 100
    assert queue.stats().pending == 0


def test_delivery_goes_on_by_itself_once_a_token_works(per, make_queue):
    """Nobody has to flush or restart: the next try, seconds later, delivers (invariant 7)."""
    vault = Vault("wrong")
    queue = make_queue(activity_token=vault)
    record(queue, 3)
    per.wait_for_requests(1)
    vault.token = per.activity_token
    per.wait_for(3, timeout=5)


def test_a_token_that_is_rotated_under_way_costs_nothing(per, make_queue, caplog):
    """If the callable has a new token by the time the old one is refused,
    the activity is accepted at once.
    """
    tokens = iter(["old"])
    queue = make_queue(activity_token=lambda: next(tokens, per.activity_token))
    with caplog.at_level(logging.INFO, "perqueue"):
        queue.record("GROUP_A", "USER_1")
        queue.flush(timeout=5)
    assert per.requests == 2
    assert caplog.records == []


@pytest.mark.parametrize("status", [200, 401, 403, 500])
def test_the_status_of_a_bad_token_does_not_matter(per, make_queue, status):
    """`invalid_auth_token` under any status is about the token: nothing is rejected (invariant 7)."""
    per.set_fault(BadToken(status))
    queue = make_queue()
    record(queue, 5)
    with pytest.raises(AuthenticationError):
        queue.flush(timeout=5)
    assert (queue.stats().pending, queue.stats().rejected) == (5, 0)
    per.clear_faults()
    queue.flush(timeout=5)
    assert per.unique("GROUP_A") == 5


@pytest.mark.parametrize("token", ["", "a b", "line\nbreak", 7, None, RuntimeError("vault is sealed")])
def test_a_callable_without_a_token_pauses_like_a_bad_one(per, make_queue, token):
    """A vault that fails, or gives something that is no token,
    pauses delivery; nothing is sent (invariant 7).
    """
    vault = Vault(token)
    queue = make_queue(activity_token=vault)
    record(queue, 5)
    with pytest.raises(AuthenticationError, match="activity_token"):
        queue.flush(timeout=5)
    assert per.requests == 0
    assert vault.asked <= 3
    vault.token = per.activity_token
    queue.flush(timeout=5)
    assert per.unique("GROUP_A") == 5


def test_a_receipt_tells_of_a_bad_token(per, make_queue):
    """Waiting for a receipt raises `AuthenticationError` after one fresh try."""
    vault = Vault("wrong")
    queue = make_queue(activity_token=vault)
    receipt = queue.record("GROUP_A", "USER_1")
    assert isinstance(receipt, Receipt)
    for _ in range(2):
        with pytest.raises(AuthenticationError):
            receipt.wait(10)
    vault.token = per.activity_token
    assert receipt.wait(10) == per.activities[0].transaction_id


def test_every_flush_makes_one_fresh_try(per, make_queue):
    """A flush in a pause does not repeat old news: it asks once, and raises what that says (invariant 7)."""
    queue = make_queue(activity_token="wrong")
    record(queue, 10)
    for number in range(1, 6):
        with pytest.raises(AuthenticationError):
            queue.flush(timeout=5)
        assert number <= per.requests <= number + 1


def test_ten_flushes_at_once_share_a_probe(per, make_queue):
    """Ten concurrent flushes against a bad token cost three requests at most (invariant 6)."""
    queue = make_queue(activity_token="wrong")
    record(queue, 10)
    with pytest.raises(AuthenticationError):
        queue.flush(timeout=5)
    before = per.requests
    barrier = Barrier(10)

    def flush(_number):
        barrier.wait(5)
        with pytest.raises(AuthenticationError):
            queue.flush(timeout=5)

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(flush, range(10)))
    assert 1 <= per.requests - before <= 3


def test_a_probe_from_before_says_nothing_to_a_flush(make_queue, until):
    """A flush that begins while a probe is under way is owed one of its own: its token may work by then."""
    gate = Gate()
    queue = make_queue(transport=gate)
    record(queue, 3)
    with pytest.raises(AuthenticationError):
        queue.flush(timeout=5)
    gate.is_slow, seen = True, gate.requests
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(queue.flush, 5)
        until(lambda: gate.requests > seen)
        gate.is_shut = False
        judge = queue._worker._drain._judge
        asked = judge.woken_at
        second = pool.submit(queue.flush, 5)
        until(lambda: judge.woken_at > asked)
        gate.is_slow = False
        second.result()
        first.result()
    assert queue.stats().delivered == 3


def test_every_request_with_a_bad_token_is_an_attempt(per, make_queue, until):
    """The audit trail has each request that Per refused for its token; what was never sent is none."""
    vault = Vault("wrong")
    queue = make_queue(activity_token=vault)
    record(queue, 10)
    for token in ("wrong", RuntimeError("vault is sealed")):
        vault.token = token
        with pytest.raises(AuthenticationError):
            queue.flush(timeout=5)
    until(lambda: queue.stats().in_flight == 0)
    attempts = [attempt for number in range(1, 11) for attempt in queue.attempts(number)]
    assert len(attempts) == per.requests >= 1
    assert {attempt.reason for attempt in attempts} == {"bad token: invalid_auth_token"}


def test_a_paused_drainer_lets_another_deliver(per, make_queue):
    """A queue with a bad token holds up no other queue on the same outbox (invariant 5)."""
    bad = make_queue(activity_token="wrong")
    record(bad, 20)
    with pytest.raises(AuthenticationError):
        bad.flush(timeout=5)
    make_queue().flush(timeout=2)
    assert per.unique("GROUP_A") == 20


def test_whoever_asks_comes_before_a_drainer_with_a_bad_token(per, make_queue, outbox, until):
    """A queue that finds the drain lock taken, and asks, has it before one whose token was refused."""
    bad = make_queue(activity_token="wrong")
    record(bad, 20)
    with pytest.raises(AuthenticationError):
        bad.flush(timeout=5)
    until(lambda: not is_drained(outbox))
    asked = bad._outbox.news().probe_requests
    with ThreadPoolExecutor() as pool:
        with drain_lock(outbox):
            good = make_queue()
            flushed = pool.submit(good.flush, 5)
            until(lambda: bad._outbox.news().probe_requests > asked)
        flushed.result()
    assert per.unique("GROUP_A") == 20


def test_a_pause_is_seen_after_a_restart(make_queue):
    """The reason of a pause is in the outbox:
    the next process shows it before it sends anything (invariant 6).
    """
    queue = make_queue(activity_token="wrong")
    record(queue, 1)
    with pytest.raises(AuthenticationError):
        queue.flush(timeout=5)
    queue.close()
    stats = make_queue(activity_token=None, drain=False).stats()
    assert (stats.pending, stats.state) == (1, DrainState.PAUSED)
    assert "invalid_auth_token" in stats.reason


def test_a_bad_token_for_a_while_hides_no_timeout(per, make_queue):
    """While the probe hangs there is no news of the token: flush times out as it should (invariant 4)."""
    queue = make_queue(activity_token="wrong", request_timeout=5, exit_timeout=0)
    record(queue, 1)
    with pytest.raises(AuthenticationError):
        queue.flush(timeout=5)
    per.set_fault(Hang())
    with pytest.raises(FlushTimeout):
        queue.flush(timeout=0.3)
