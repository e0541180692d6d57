"""What Per refuses: one activity, a few, or everything."""

import logging
import time
from threading import Event, Thread

import pytest

from perqueue import ActivityRejected, DrainState, FlushTimeout, RetryPolicy
from perqueue.sandbox import Latency, RateLimited, Refuse, Sandbox, Status

QUICK = RetryPolicy(base=0.05, cap=0.2, activity_cap=0.2)
HTML = "<html><body>Bad request</body></html>"


def flush_and_be_refused(queue):
    with pytest.raises(ActivityRejected):
        queue.flush(timeout=10)


def is_poison(activity):
    return activity.user_id.startswith("POISON")


# --- A few that get no answer ---


@pytest.mark.parametrize(
    ("fault", "count"),
    [
        (Status(400, HTML, "text/html"), 1_000),
        (Status(413, HTML, "text/html"), 300),
        (Status(500), 300),
    ],
    ids=["400", "413", "500"],
)
def test_ten_poison_activities_hold_up_nobody(per, make_queue, until, fault, count):
    """Of 1,000 activities 10 never get an answer: the other 990 arrive without delay (invariant 8)."""
    per.set_fault(fault, when=is_poison)
    queue = make_queue()
    for number in range(count):
        poison = number % (count // 10) == 0
        queue.record("GROUP_A", f"{'POISON' if poison else 'USER'}_{number}")
    per.wait_for(count - 10, timeout=10)
    until(lambda: queue.stats().pending == 10)
    assert (queue.stats().rejected, queue.stats().delivered) == (0, count - 10)
    assert queue.stats().state in (DrainState.DELIVERING, DrainState.BACKING_OFF)
    assert sum(request.fault is not None for request in per.request_log) < 100
    per.clear_faults()
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == count


def test_ten_that_are_always_one_too_many_hold_up_nobody(per, make_queue, until):
    """Of 1,000 activities 10 get 429 whatever the rate: the others are not slowed down (invariant 8)."""
    per.set_fault(RateLimited(), when=is_poison)
    recorder = make_queue(drain=False)
    for number in range(50):
        recorder.record("GROUP_A", f"EARLY_{number}")
    for number in range(1_000):
        recorder.record("GROUP_A", f"{'POISON' if number % 100 == 0 else 'USER'}_{number}")
    queue = make_queue()  # now that all is there: a slow recorder's rate would be learnt
    queue.record("GROUP_A", "LAST")
    per.wait_for(50 + 990 + 1, timeout=10)
    until(lambda: queue.stats().pending == 10)
    per.clear_faults()
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 1_051


def test_poison_at_the_head_of_the_queue_is_overtaken(per, make_queue):
    """The oldest activity never gets an answer, and those behind it do not wait for it (invariant 8)."""
    per.set_fault(Status(500), when=is_poison)
    queue = make_queue()
    queue.record("GROUP_A", "POISON")
    with pytest.raises(FlushTimeout):
        queue.flush(timeout=0.3)
    for number in range(50):
        queue.record("GROUP_A", f"USER_{number}")
    per.wait_for(50, timeout=5)
    with pytest.raises(FlushTimeout, match="1 activity is not accepted") as caught:
        queue.flush(timeout=0.3)
    assert caught.value.pending == 1


def test_poison_is_tried_again_and_heals_by_itself(per, make_queue):
    """An activity that failed on its own account is sent again after its own wait, without any flush."""
    per.set_fault(Status(500), when=is_poison, times=3)
    queue = make_queue(retry=QUICK)
    queue.record("GROUP_A", "POISON")
    for number in range(20):
        queue.record("GROUP_A", f"USER_{number}")
    per.wait_for(21, timeout=10)
    assert per.unique("GROUP_A") == 21


# --- A few that are refused ---


def test_a_refused_activity_is_rejected_with_the_reason(per, make_queue):
    """One that Per refuses is kept as rejected, the others are accepted,
    and flush says so once (invariant 3).
    """
    per.set_fault(Refuse("no such group"), when=is_poison)
    told, seen = Event(), []
    queue = make_queue(on_rejected=lambda activity: (seen.append(activity), told.set()))
    for number in range(10):
        queue.record("GROUP_A", f"USER_{number}")
    poison = queue.record("GROUP_B", "POISON")
    with pytest.raises(ActivityRejected, match="no such group") as caught:
        queue.flush(timeout=10)
    assert caught.value.reason == "no such group"
    (activity,) = caught.value.activities
    assert (activity.billing_id, activity.user_id, activity.id) == ("GROUP_B", "POISON", poison.id)
    assert (queue.stats().pending, queue.stats().rejected, queue.stats().delivered) == (0, 1, 10)
    queue.flush(timeout=10)
    with pytest.raises(ActivityRejected, match="no such group"):
        poison.wait(5)
    assert told.wait(5)
    assert [(each.user_id, each.reason) for each in seen] == [("POISON", "no such group")]
    assert sum(request.parameters["userId"] == "POISON" for request in per.request_log) == 1


def test_each_flush_tells_of_the_refusals_since_the_one_before(per, make_queue):
    """A refusal that was told is not told again; a new one is."""
    per.set_fault(Refuse("no such group"), when=is_poison)
    queue = make_queue()
    for number in range(3):
        queue.record("GROUP_A", f"POISON_{number}")
        with pytest.raises(ActivityRejected) as caught:
            queue.flush(timeout=10)
        assert [activity.user_id for activity in caught.value.activities] == [f"POISON_{number}"]
        queue.record("GROUP_A", f"USER_{number}")
        queue.flush(timeout=10)
    assert queue.stats().rejected == 3


def test_older_refusals_are_not_raised_by_a_new_queue(per, make_queue):
    """What was refused before this queue was made shows in `stats()`, and fails no flush."""
    per.set_fault(Refuse("no such group"), when=is_poison)
    first = make_queue()
    first.record("GROUP_A", "POISON")
    with pytest.raises(ActivityRejected):
        first.flush(timeout=10)
    first.close()
    second = make_queue()
    second.record("GROUP_A", "USER_1")
    second.flush(timeout=10)
    assert (second.stats().rejected, second.stats().delivered) == (1, 1)


def test_a_callback_that_fails_stops_nothing(per, make_queue, caplog):
    """A mistake in `on_rejected` is logged, and delivery goes on (invariant 8)."""

    def fail(_activity):
        raise ZeroDivisionError("the callback's own")

    per.set_fault(Refuse("no such group"), when=is_poison)
    queue = make_queue(on_rejected=fail)
    queue.record("GROUP_A", "POISON")
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(ActivityRejected):
        queue.flush(timeout=10)
    queue.record("GROUP_A", "USER_2")
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 2
    assert "a perqueue callback has failed" in caplog.text


def test_refusals_for_different_reasons_are_all_rejected(per, make_queue):
    """Thirty refusals for thirty reasons are thirty bad activities: each is rejected."""
    for number in range(30):
        per.set_fault(
            Refuse(f"no such user {chr(65 + number)}"),
            when=lambda activity, number=number: activity.user_id == f"POISON_{number}",
        )
    queue = make_queue()
    for number in range(30):
        queue.record("GROUP_A", f"POISON_{number}")
    with pytest.raises(ActivityRejected, match="30 of the activities"):
        queue.flush(timeout=10)
    assert (queue.stats().pending, queue.stats().rejected) == (0, 30)


def test_refusals_among_acceptances_are_rejected_however_many(per, make_queue):
    """A hundred bad activities among good ones are rejected: something is accepted, so it is their fault."""
    per.set_fault(Refuse("no such group"), when=is_poison)
    queue = make_queue(max_in_flight=1)
    for number in range(100):
        queue.record("GROUP_A", f"POISON_{number}")
        if number % 5 == 0:
            queue.record("GROUP_A", f"USER_{number}")
    with pytest.raises(ActivityRejected, match="100 or more"):
        queue.flush(timeout=10)
    assert (queue.stats().pending, queue.stats().rejected, queue.stats().delivered) == (0, 100, 20)


# --- Everything is refused ---


def test_when_everything_is_refused_nothing_is_rejected(per, make_queue, caplog):
    """20 refusals in a row: all go back to pending, delivery pauses with the reason,
    flush says it (invariant 8).
    """
    per.set_fault(Refuse("invalid_activity_type_id"))
    queue = make_queue()
    with caplog.at_level(logging.WARNING, "perqueue"):
        for number in range(100):
            queue.record("GROUP_A", f"USER_{number}")
        began = time.monotonic()
        with pytest.raises(ActivityRejected, match="invalid_activity_type_id") as caught:
            queue.flush(timeout=30)
        assert time.monotonic() - began < 10
    assert caught.value.reason == "invalid_activity_type_id"
    assert 20 <= per.requests <= 20 + 32
    stats = queue.stats()
    assert (stats.pending, stats.rejected, stats.delivered) == (100, 0, 0)
    assert stats.state is DrainState.PAUSED
    assert "invalid_activity_type_id" in stats.reason
    assert [entry.levelno for entry in caplog.records] == [logging.ERROR]


def test_each_flush_of_a_pause_asks_per_once(per, make_queue, until):
    """However often somebody waits while everything is refused: one request, whose answer is told; the
    first that is accepted ends the pause.
    """
    per.set_fault(Refuse("invalid_activity_type_id"))
    queue = make_queue()
    for number in range(100):
        queue.record("GROUP_A", f"USER_{number}")
    until(lambda: queue.stats().state is DrainState.PAUSED and queue.stats().in_flight == 0)
    for _ in range(3):
        before = per.requests
        began = time.monotonic()
        with pytest.raises(ActivityRejected, match="invalid_activity_type_id"):
            queue.flush(timeout=30)
        assert time.monotonic() - began < 10
        assert per.requests - before == 1
        assert (queue.stats().pending, queue.stats().rejected) == (100, 0)

    per.clear_faults()
    queue.flush(timeout=10)
    assert per.unique("GROUP_A") == 100
    until(lambda: queue.stats().reason is None)
    assert (queue.stats().pending, queue.stats().rejected) == (0, 0)


def test_nineteen_refusals_are_not_yet_everything(per, make_queue):
    """One fewer than the streak: each of them is rejected."""
    per.set_fault(Refuse("no such group"))
    queue = make_queue()
    for number in range(19):
        queue.record("GROUP_A", f"USER_{number}")
    with pytest.raises(ActivityRejected, match="19 of the activities"):
        queue.flush(timeout=10)
    assert (queue.stats().pending, queue.stats().rejected) == (0, 19)
    assert queue.stats().state is DrainState.IDLE


def test_a_streak_is_counted_over_restarts(per, make_queue):
    """A cron job that delivers a few at a time finds a wrong activity type as well (invariant 8)."""
    per.set_fault(Refuse("invalid_activity_type_id"))
    for run in range(3):
        queue = make_queue()
        for number in range(7):
            queue.record("GROUP_A", f"USER_{run}_{number}")
        with pytest.raises(ActivityRejected):
            queue.flush(timeout=10)
        stats = queue.stats()
        queue.close()
    assert (stats.pending, stats.rejected, stats.state) == (20 + 1, 0, DrainState.PAUSED)


def test_a_corrected_activity_type_ends_the_pause(make_queue):
    """The probe is what was recorded last:
    with a corrected type everything else is tried again (invariant 8).
    """
    with Sandbox(activity_types=["GOOD"]) as per:
        queue = make_queue(base_url=per.url, activity_type_id="TYPO")
        for number in range(30):
            queue.record("GROUP_A", f"USER_{number}")
        with pytest.raises(ActivityRejected, match="invalid_activity_type_id"):
            queue.flush(timeout=10)
        for number in range(5):
            queue.record("GROUP_A", f"LATER_{number}", activity_type_id="GOOD")
        with pytest.raises((ActivityRejected, FlushTimeout)):
            queue.flush(timeout=5)
        per.wait_for(5, timeout=5)
        assert {activity.activity_type_id for activity in per.activities} == {"GOOD"}
        assert queue.stats().delivered == 5
        assert queue.stats().pending + queue.stats().rejected == 30


def test_a_probe_from_before_says_nothing_to_a_flush(make_queue, until):
    """A flush that begins while a probe is under way is owed one of its own, of what was corrected since."""
    with Sandbox(activity_types=["GOOD"]) as per:
        queue = make_queue(base_url=per.url, activity_type_id="TYPO")
        for number in range(30):
            queue.record("GROUP_A", f"USER_{number}")
        with pytest.raises(ActivityRejected):
            queue.flush(timeout=10)
        until(lambda: queue.stats().in_flight == 0)
        per.set_fault(Latency(0.5), times=1)
        seen = per.requests
        first = Thread(target=flush_and_be_refused, args=(queue,))
        first.start()
        until(lambda: per.requests > seen)
        queue.record("GROUP_A", "LATER", activity_type_id="GOOD")
        flush_and_be_refused(queue)
        first.join()
        per.wait_for(1, timeout=5)


def test_however_many_ask_whoever_waits_is_told(make_queue, until):
    """A flush ends with the reason although others ask for a probe more often than Per answers one."""
    with Sandbox(activity_types=["GOOD"]) as per:
        queue = make_queue(base_url=per.url, activity_type_id="TYPO")
        for number in range(20):
            queue.record("GROUP_A", f"USER_{number}")
        flush_and_be_refused(queue)
        until(lambda: queue.stats().in_flight == 0)
        per.set_fault(Latency(0.2))
        told = Event()

        def ask():
            while not told.wait(0.02):
                queue._nudge()

        asking = Thread(target=ask)
        asking.start()
        try:
            with pytest.raises(ActivityRejected):
                queue.flush(timeout=10)
        finally:
            told.set()
            asking.join()


def test_a_pause_because_of_refusals_holds_over_a_restart(per, make_queue):
    """The next start knows that everything was refused, and sends no flood (invariant 6)."""
    per.set_fault(Refuse("invalid_activity_type_id"))
    queue = make_queue()
    for number in range(50):
        queue.record("GROUP_A", f"USER_{number}")
    with pytest.raises(ActivityRejected):
        queue.flush(timeout=10)
    queue.close()
    before = per.requests
    again = make_queue()
    assert again.stats().state is DrainState.PAUSED
    with pytest.raises(ActivityRejected, match="invalid_activity_type_id"):
        again.flush(timeout=10)
    assert 1 <= per.requests - before <= 2
    assert (again.stats().pending, again.stats().rejected) == (50, 0)


def test_a_receipt_tells_that_everything_is_refused(per, make_queue):
    """Whoever waits for one of them is told the common reason."""
    per.set_fault(Refuse("invalid_activity_type_id"))
    queue = make_queue()
    receipts = [queue.record("GROUP_A", f"USER_{number}") for number in range(40)]
    with pytest.raises(ActivityRejected, match="invalid_activity_type_id"):
        receipts[39].wait(10)
