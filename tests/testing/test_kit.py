"""`perqueue.testing`: faults by plain names, assertions that say what is there instead, and clean endings."""

import os
import time

import pytest

from perqueue import (
    ActivityRejected,
    AuthenticationError,
    ConfigurationError,
    FlushTimeout,
    PerQueue,
    QueueClosed,
)
from perqueue._audit import history
from perqueue.sandbox import Hang
from perqueue.testing import (
    LocalPer,
    assert_delivered,
    assert_recorded,
    begin_test,
    sandbox_environment,
    sandbox_queue,
)


def failure(check, *arguments, **options):
    with pytest.raises(AssertionError) as told:
        check(*arguments, **options)
    return str(told.value)


def test_outage_refuses_connections_until_it_is_over(per_queue, per_sandbox):
    """During an outage nothing is delivered; afterwards everything is."""
    with per_sandbox.outage():
        per_queue.record("ACME", "USER_1")
        with pytest.raises(FlushTimeout):
            per_queue.flush(0.1)
        assert per_sandbox.requests == 0
    per_queue.flush()
    assert per_sandbox.accepted == 1


def test_rejects_refuses_those_that_it_names(per_queue, per_sandbox):
    """Only activities with all of these IDs are refused, for this reason."""
    per_sandbox.rejects("no_such_user", billing_id="ACME", user_id="USER_2")
    for billing_id, user_id in (("ACME", "USER_1"), ("ACME", "USER_2"), ("OTHER", "USER_2")):
        per_queue.record(billing_id, user_id)
    with pytest.raises(ActivityRejected, match="no_such_user"):
        per_queue.flush()
    assert {(one.billing_id, one.user_id) for one in per_sandbox.activities} == {
        ("ACME", "USER_1"),
        ("OTHER", "USER_2"),
    }


def test_rejects_without_ids_refuses_everything(per_queue, per_sandbox):
    """Without IDs every activity is refused."""
    per_sandbox.rejects()
    per_queue.record("ACME", "USER_1")
    with pytest.raises(ActivityRejected, match="rejected"):
        per_queue.flush()


def test_slow_answers_late(per_queue, per_sandbox):
    """A slow Per answers so many seconds late, not earlier."""
    began = time.monotonic()
    with per_sandbox.slow(0.15):
        per_queue.record("ACME", "USER_1").wait(10)
    assert time.monotonic() - began >= 0.15


def test_bad_token_is_told_and_passes(per_queue, per_sandbox):
    """A refused token is what `flush()` says it is, and nothing is lost by it."""
    per_sandbox.bad_token()
    per_queue.record("ACME", "USER_1")
    with pytest.raises(AuthenticationError):
        per_queue.flush()
    per_sandbox.recover()
    per_queue.flush()
    assert per_sandbox.accepted == 1


def test_rate_limit_answers_429(per_queue, per_sandbox):
    """Beyond the rate Per asks to come again later."""
    per_sandbox.rate_limit(per_second=1, burst=1)
    for n in range(3):
        per_queue.record("ACME", f"USER_{n}")
    with pytest.raises(FlushTimeout, match="429"):
        per_queue.flush(0.5)
    assert per_sandbox.accepted == 1


def test_lost_answers_count(per_queue, per_sandbox):
    """What Per accepted without saying so is sent again: counted twice, and still one user."""
    per_sandbox.lost_answers(times=2)
    per_queue.record("ACME", "USER_1")
    per_queue.flush()
    assert (per_sandbox.accepted, per_sandbox.unique("ACME")) == (3, 1)


def test_recover_after_the_end_is_harmless():
    """A local Per that was stopped stays stopped."""
    with LocalPer() as per:
        trouble = per.outage()
    with trouble:
        pass
    assert "stopped" in repr(per)


def test_assert_recorded_counts_what_fits(per_queue):
    """All that is named must fit; `times` is exact, without it one is enough."""
    per_queue.record("ACME", "USER_1")
    per_queue.record("ACME", "USER_1", activity_type_id="EXPORT")
    per_queue.record("ACME", "USER_2")
    assert_recorded(per_queue)
    assert_recorded(per_queue, billing_id="ACME", times=3)
    assert_recorded(per_queue, user_id="USER_1", times=2)
    assert_recorded(per_queue, user_id="USER_1", activity_type_id="EXPORT", times=1)
    assert_recorded(per_queue, billing_id="OTHER", times=0)
    for wrong in ({"times": 0}, {"times": 2}, {"billing_id": "OTHER"}, {"user_id": "USER_1", "times": 1}):
        failure(assert_recorded, per_queue, **wrong)


def test_assert_recorded_shows_what_was_recorded_instead(per_queue, per_sandbox):
    """The failure lists what is there, nearest first, with its state, and says where each differs."""
    per_sandbox.outage()
    per_queue.record("OTHER", "USER_9")
    for n in range(30):
        per_queue.record("ACME", f"USER_{n}")
    text = failure(assert_recorded, per_queue, billing_id="ACME", user_id="USER_X")
    first, header, nearest, *_ = text.splitlines()
    assert first == "expected at least 1 recorded with billing_id='ACME', user_id='USER_X', found 0"
    assert header == "what was recorded, 31 in all:"
    assert nearest.startswith(
        "  billing_id='ACME', user_id='USER_0', activity_type_id='sandbox-activity-type'"
    )
    assert "pending" in nearest
    assert nearest.endswith("<- another user_id")
    assert "and 11 more" in text
    assert "OTHER" not in text


def test_assert_recorded_finds_the_outbox(per_queue, tmp_path, monkeypatch):
    """A queue, closed or not, its path, or the variable: each names the same outbox."""
    per_queue.record("ACME", "USER_1")
    path = tmp_path / "per_queue.db"
    per_queue.close()
    with pytest.raises(QueueClosed):
        per_queue.history()
    assert_recorded(per_queue, times=1)
    assert_recorded(path, times=1)
    assert_recorded(str(path), times=1)
    monkeypatch.setenv("PERQUEUE_OUTBOX", str(path))
    assert_recorded(times=1)
    monkeypatch.delenv("PERQUEUE_OUTBOX")
    with pytest.raises(ConfigurationError, match="PERQUEUE_OUTBOX"):
        assert_recorded(times=1)


def test_assert_recorded_says_why_there_may_be_nothing(per_queue, tmp_path):
    """An empty outbox, one that does not exist, and a queue on another one are told apart."""
    nowhere = tmp_path / "nowhere.db"
    assert_recorded(nowhere, times=0)
    assert "no such file" in failure(assert_recorded, nowhere)
    assert not nowhere.exists()
    assert "Was record() called" in failure(assert_recorded, per_queue)
    with sandbox_queue(nowhere):
        assert "nowhere.db" in failure(assert_recorded, per_queue).splitlines()[-1]


def test_ids_of_another_type_are_refused(per_queue):
    """A number is no ID, here as in `record()`: it would never fit."""
    with pytest.raises(ConfigurationError, match="user_id must be a str"):
        assert_recorded(per_queue, user_id=1)


def test_assert_delivered_waits(per_queue, per_sandbox):
    """It returns as soon as Per has it, and fails with what Per has instead."""
    with per_sandbox.slow(0.1):
        per_queue.record("ACME", "USER_1")
        assert_delivered(per_sandbox, user_id="USER_1")
    per_sandbox.outage()
    per_queue.record("ACME", "USER_2")
    text = failure(assert_delivered, per_sandbox, user_id="USER_2", timeout=0.05)
    assert "none with user_id='USER_2' within 0.05 s" in text
    assert "user_id='USER_1'" in text
    assert "down" in text


def test_environment_is_as_before(monkeypatch):
    """The variables lead to the local Per inside of the block, and are as they were after it."""
    monkeypatch.setenv("PER_BASE_URL", "https://elsewhere.example")
    monkeypatch.setenv("PERQUEUE_DRAIN", "0")
    before = dict(os.environ)
    with sandbox_environment() as per:
        left_open = PerQueue()
        left_open.record("ACME", "USER_1").wait(5)
        assert per.unique("ACME") == 1
        assert_recorded(times=1)
    assert dict(os.environ) == before
    with pytest.raises(QueueClosed):
        left_open.record("ACME", "USER_2")


def test_leaving_closes_no_queue_of_another_outbox(per_queue):
    """The end of an environment closes the queues on its own outbox, and those only."""
    with sandbox_environment():
        PerQueue(drain=False)
    per_queue.record("ACME", "USER_1").wait(5)


def test_leaving_does_not_wait_for_what_hangs(per_sandbox, tmp_path):
    """A queue whose request hangs is closed at once, and keeps the activity."""
    began = time.monotonic()
    with sandbox_queue(tmp_path / "activities.db", per=per_sandbox, exit_timeout=30, request_timeout=30) as (
        queue,
        _,
    ):
        per_sandbox.set_fault(Hang())
        queue.record("ACME", "USER_1")
        per_sandbox.wait_for_requests(1)
    assert time.monotonic() - began < 15
    [record] = history(tmp_path / "activities.db")
    assert record.state == "pending"


def test_a_shared_outbox_begins_anew_with_each_test(tmp_path):
    """What an earlier test left pending is delivered before the next one, which sees nothing of it."""
    outbox = tmp_path / "shared.db"
    with sandbox_environment(outbox) as per:
        begin_test(per, outbox)
        queue = PerQueue()
        per.outage()
        queue.record("ACME", "USER_1")
        assert_recorded(times=1)
        begin_test(per, outbox)
        assert_recorded(queue, times=0)
        assert (per.accepted, queue.stats().pending) == (0, 0)
        queue.record("ACME", "USER_2")
        assert_recorded(times=1)
        begin_test(per, outbox)
        begin_test(per, outbox)
        assert_recorded(times=0)
    assert_recorded(outbox, times=2)  # a shared one no more
