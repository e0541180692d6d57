import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perqueue import RetryPolicy
from perqueue._delivery.pace import PROBE_INTERVAL, Pace, jittered
from perqueue._stats import Gate

POLICY = RetryPolicy()


class FakeClock:
    """A monotonic clock that a test moves."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def pace(clock):
    return Pace(POLICY, 32, 10.0, clock)


def flow(pace, clock, answers=64):
    """Let requests flow at full speed."""
    for _ in range(answers):
        pace.answered(clock.now)
    assert pace.allowance() == 32


def probe(pace, clock):
    """Wait until a probe may pass, send it, and return when that was."""
    clock.now += pace.wait()
    assert pace.allowance() == 1
    pace.sending()
    sent_at = clock.now
    clock.now += 0.01
    return sent_at


# --- Waits ---


@pytest.mark.parametrize("failures", [1, 2, 3, 7, 8, 9, 30, 1_000, 100_000])
def test_waits_have_full_jitter_up_to_a_cap(failures):
    """A wait lies anywhere between 0 and the doubled base, never above the cap (invariant 6)."""
    most = min(60.0, 0.5 * 2 ** min(failures - 1, 60))
    waits = [jittered(0.5, 60.0, failures) for _ in range(400)]
    assert all(0 <= wait <= most for wait in waits)
    assert min(waits) < most * 0.1
    assert max(waits) > most * 0.9


@given(
    base=st.floats(1e-6, 1e6), cap=st.floats(1e-6, 1e6), failures=st.integers(min_value=-5, max_value=10**6)
)
def test_a_wait_is_never_negative_or_beyond_its_cap(base, cap, failures):
    """Whatever the policy, a wait stays within its bounds."""
    assert 0 <= jittered(base, cap, failures) <= cap


def test_the_waits_of_an_outage_grow_to_the_cap(pace, clock):
    """Failure after failure the longest wait doubles, up to the cap, and never beyond (invariant 6)."""
    pace.failed(clock.now, "no answer")
    for number in range(2, 200):
        assert pace.wait() <= min(60.0, 0.5 * 2 ** (number - 2))
        pace.failed(probe(pace, clock), "no answer")
        assert pace.failures == number
    assert pace.wait() <= 60.0


def test_ten_thousand_failures_break_nothing(clock):
    """After days of an outage the waits are still computed (invariant 11)."""
    pace = Pace(RetryPolicy(base=1e-9, cap=1e-9), 1, 10.0, clock)
    for _ in range(10_000):
        pace.failed(probe(pace, clock), "no answer")
    assert 0 <= pace.wait() <= 1e-9


# --- One probe ---


def test_while_waiting_nothing_may_be_sent_and_then_one_probe(pace, clock):
    """A closed gate lets nothing pass until its time, then one request (invariant 6)."""
    flow(pace, clock)
    pace.throttled(clock.now, "HTTP 429", 7.0)
    assert (pace.allowance(), pace.wait()) == (0, 7.0)
    clock.now += 6.999
    assert pace.allowance() == 0
    clock.now += 0.001
    assert (pace.allowance(), pace.wait()) == (1, 0.0)
    clock.now += 10_000
    assert pace.allowance() == 1


@pytest.mark.parametrize("gate", list(Gate))
def test_whatever_the_reason_one_probe_passes_at_a_time(pace, clock, gate):
    """At most one probe is allowed, whatever closed the gate (invariant 6)."""
    pace.resume(gate, "as stored", 5.0)
    assert pace.allowance() == 0
    clock.now += 5.0
    assert pace.allowance() == 1
    pace.sending()
    assert pace.allowance() == 1


def test_thirty_two_failures_of_one_round_count_once(pace, clock):
    """What was under way together fails together, as one failure (invariant 6)."""
    flow(pace, clock)
    sent_at = clock.now
    clock.now += 0.01
    for _ in range(32):
        pace.failed(sent_at, "connection reset")
        clock.now += 0.001
    assert pace.failures == 1
    assert pace.wait() <= 0.5


def test_thirty_two_refusals_of_one_round_count_once(pace, clock):
    """A bad token that 32 requests meet at once is one refusal: the pause does not grow (invariant 7)."""
    flow(pace, clock)
    sent_at = clock.now
    clock.now += 0.01
    for _ in range(32):
        pace.refused(sent_at, Gate.BAD_TOKEN, "invalid_auth_token")
    assert (pace.failures, pace.wait()) == (1, 2.0)


# --- Ramp ---


def test_sending_starts_with_one_and_doubles_with_each_round_trip(pace, clock):
    """The number in flight grows by one with each answer, up to the limit (invariant 6)."""
    seen = []
    for _ in range(7):
        allowed = pace.allowance()
        seen.append(allowed)
        for _ in range(allowed):
            pace.answered(clock.now)
    assert seen == [1, 2, 4, 8, 16, 32, 32]


def test_after_an_outage_the_rate_ramps_up_again(pace, clock):
    """Recovery begins with one request, not with a flood (invariant 6)."""
    flow(pace, clock)
    pace.failed(clock.now, "no answer")
    pace.failed(probe(pace, clock), "no answer")
    pace.answered(probe(pace, clock))
    assert pace.gate is None
    assert pace.reason is None
    assert pace.allowance() == 2
    assert pace.failures == 0


def test_failures_among_successes_shrink_what_is_in_flight(pace, clock):
    """A single failure sends a tenth less, once in a round trip, and stops nothing (invariant 8)."""
    flow(pace, clock)
    sent_at = clock.now
    clock.now += 0.1
    for _ in range(5):
        pace.stumbled(sent_at)
    assert (pace.gate, pace.allowance()) == (None, 28)
    for _ in range(100):
        pace.stumbled(clock.now)
    assert pace.allowance() == 1


def test_after_a_failure_the_number_in_flight_grows_by_one_a_round_trip(pace, clock):
    """Where doubling led too far, growth is additive from then on."""
    flow(pace, clock)
    for _ in range(20):
        pace.stumbled(clock.now)
    few = pace.allowance()
    for _ in range(few + 1):
        pace.answered(clock.now)
    assert pace.allowance() == few + 1


def test_rising_latency_shrinks_what_is_in_flight(pace, clock):
    """When answers take twice as long as they could, more in flight helps nobody."""
    flow(pace, clock)
    for _ in range(400):
        sent_at = clock.now
        clock.now += 0.05 * pace.limit
        pace.answered(sent_at)
    assert 2 <= pace.limit <= 8


@pytest.mark.parametrize("deadline", [1.0, 10.0, 60.0])
@pytest.mark.parametrize(("part", "grows"), [(0.35, True), (0.45, False)])
def test_answers_that_are_nearly_too_late_end_the_growth(clock, deadline, part, grows):
    """Where many hosts wait in one queue, none of them lengthens it until answers miss their deadline."""
    pace = Pace(POLICY, 32, deadline, clock)
    latency = part * deadline
    flow(pace, clock)
    pace.stumbled(clock.now)
    for _ in range(3_000):  # long enough for such a latency to count as the lowest that there is
        sent_at = clock.now
        clock.now += latency
        pace.answered(sent_at)
    before = pace.limit
    for _ in range(3_000):
        sent_at = clock.now
        clock.now += latency
        pace.answered(sent_at)
    assert pace.limit == (32 if grows else before)
    assert grows or before < 32


def test_steady_latency_shrinks_nothing(pace, clock):
    """A server that is far away, with the usual noise, gets all that `max_in_flight` allows."""
    for number in range(2000):
        sent_at = clock.now
        clock.now += 0.2 + 0.05 * (number % 3)
        pace.answered(sent_at)
    assert pace.limit == 32


@given(st.lists(st.sampled_from(["answered", "stumbled", "failed", "throttled", "refused", "wake", "time"])))
def test_the_allowance_always_lies_between_nothing_and_the_limit(events):
    """Whatever happens in whatever order, at most `max_in_flight` may be sent, and one while probing."""
    clock = FakeClock()
    pace = Pace(POLICY, 5, 10.0, clock)
    for event in events:
        match event:
            case "answered":
                pace.answered(clock.now)
            case "failed":
                pace.failed(clock.now, "no answer")
            case "stumbled":
                pace.stumbled(clock.now)
            case "throttled":
                pace.throttled(clock.now, "HTTP 429", 3.0)
            case "refused":
                pace.refused(clock.now, Gate.REFUSED, "no such type")
            case "time":
                clock.now += 1.0
            case _:
                getattr(pace, event)()
        assert 0 <= pace.allowance() <= 5
        assert 1 <= pace.limit <= 5
        assert (pace.gate is None) == (pace.reason is None)
        assert pace.gate is None or pace.allowance() <= 1
        assert (pace.wait() > 0) == (pace.allowance() == 0)


# --- Retry-After ---


def test_retry_after_is_obeyed_exactly(pace, clock):
    """A `Retry-After` is waited for without jitter (invariant 6)."""
    pace.throttled(clock.now, "HTTP 503", 120.0)
    assert (pace.gate, pace.wait()) == (Gate.RETRY_AFTER, 120.0)


@pytest.mark.parametrize("asked", [301.0, 86_400.0, 1e300, float("inf")])
def test_retry_after_is_obeyed_up_to_five_minutes(pace, clock, asked):
    """A longer `Retry-After` is cut to five minutes (invariant 6)."""
    pace.throttled(clock.now, "HTTP 429", asked)
    assert pace.wait() == 300.0


def test_waking_does_not_override_retry_after(pace, clock):
    """Nobody's impatience sends anything before Per asked for it (invariant 6)."""
    pace.throttled(clock.now, "HTTP 429", 120.0)
    for _ in range(10):
        pace.wake()
        clock.now += 1.0
        assert pace.allowance() == 0
    assert pace.wait() == 110.0


def test_a_stored_retry_after_is_not_overridden_either(pace, clock):
    """What an earlier process had stored stands as well (invariant 6)."""
    pace.resume(Gate.RETRY_AFTER, "HTTP 429", 60.0)
    pace.wake()
    assert (pace.allowance(), pace.wait()) == (0, 60.0)


def test_a_shorter_retry_after_does_not_cut_a_longer_one(pace, clock):
    """Of two waits that Per asked for, the later end counts (invariant 6)."""
    flow(pace, clock)
    sent_at = clock.now
    pace.throttled(sent_at, "HTTP 429", 100.0)
    pace.throttled(sent_at, "HTTP 429", 5.0)
    assert pace.wait() == 100.0
    pace.throttled(sent_at, "HTTP 429", 200.0)
    assert pace.wait() == 200.0


def test_what_was_under_way_does_not_end_a_retry_after(pace, clock):
    """Neither an answer nor a failure of a request sent before opens the gate early (invariant 6)."""
    flow(pace, clock)
    sent_at = clock.now
    clock.now += 0.01
    pace.throttled(sent_at, "HTTP 429", 60.0)
    pace.answered(sent_at)
    pace.failed(sent_at, "connection reset")
    pace.throttled(sent_at, "HTTP 429", None)
    assert (pace.gate, pace.wait()) == (Gate.RETRY_AFTER, 60.0)


@pytest.mark.parametrize("gate", [Gate.BAD_TOKEN, Gate.REFUSED])
def test_a_refusal_that_was_under_way_does_not_cut_a_retry_after(pace, clock, gate):
    """A refusal that arrives beside a `Retry-After` sends nothing before its end (invariant 6)."""
    flow(pace, clock)
    sent_at = clock.now
    clock.now += 0.01
    pace.throttled(sent_at, "HTTP 429", 120.0)
    pace.refused(sent_at, gate, "no")
    pace.wake()
    assert pace.allowance() == 0
    assert pace.wait() >= 119.0


def test_429_without_retry_after_is_a_failure_like_any_other(pace, clock):
    """Without a time to wait for, and with nothing taken, the usual backoff applies."""
    pace.throttled(clock.now, "HTTP 429", None)
    assert (pace.gate, pace.failures) == (Gate.BACKING_OFF, 1)
    assert pace.wait() <= 0.5


def test_429_among_successes_only_slows_down(pace, clock):
    """Where Per takes some and refuses others for their number, the rate falls, and nothing is paused."""
    for _ in range(100):
        pace.sending()
        clock.now += 0.01
        pace.answered(clock.now - 0.01)
    pace.throttled(clock.now, "HTTP 429", None)
    assert pace.gate is None
    clock.now += 0.1
    pace.sending()
    pace.sending()
    assert pace.spacing() == pytest.approx(0.015, rel=0.2)
    assert pace.rate == pytest.approx(100, rel=0.1)


# --- Pauses ---


def test_a_bad_token_is_tried_again_after_2_4_8_seconds_up_to_a_minute(pace, clock):
    """A bad token pauses for longer each time, and is tried at least once a minute (invariant 7)."""
    waits = []
    pace.refused(clock.now, Gate.BAD_TOKEN, "invalid_auth_token")
    for _ in range(8):
        waits.append(pace.wait())
        pace.refused(probe(pace, clock), Gate.BAD_TOKEN, "invalid_auth_token")
    assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_a_token_that_stays_bad_for_weeks_breaks_nothing(pace, clock):
    """After tens of thousands of refused probes the next one is still a minute away (invariant 7)."""
    for _ in range(30_000):
        pace.refused(probe(pace, clock), Gate.BAD_TOKEN, "invalid_auth_token")
    assert pace.wait() == 60.0


def test_while_everything_is_refused_there_is_one_probe_a_minute(pace, clock):
    """A pause because of refusals is one minute long, each time (invariant 8)."""
    for _ in range(5):
        pace.refused(clock.now, Gate.REFUSED, "invalid_activity_type_id")
        assert (pace.gate, pace.wait()) == (Gate.REFUSED, PROBE_INTERVAL)
        probe(pace, clock)


@pytest.mark.parametrize("gate", [Gate.BACKING_OFF, Gate.BAD_TOKEN, Gate.REFUSED])
def test_waking_ends_any_other_wait_with_one_probe(pace, clock, gate):
    """Somebody who waits gets a fresh try at once, of one request (invariant 4)."""
    pace.resume(gate, "as stored", 50.0)
    pace.wake()
    assert (pace.allowance(), pace.wait()) == (1, 0.0)


def test_waking_again_and_again_is_one_probe_every_tenth_of_a_second(clock):
    """However many callers of `flush()` ask, they bring about ten probes a second (invariant 6)."""
    pace = Pace(RetryPolicy(base=1e6, cap=1e6), 32, 10.0, clock)
    probes = 0
    pace.failed(clock.now, "no answer")
    for _ in range(1_000):
        clock.now += 0.001
        pace.wake()
        if pace.allowance():
            pace.sending()
            probes += 1
            pace.failed(clock.now, "no answer")
    assert 9 <= probes <= 11


def test_waking_starts_the_waits_from_the_beginning(pace, clock):
    """After a wake-up the backoff is short again, because somebody waits."""
    for _ in range(20):
        pace.failed(probe(pace, clock), "no answer")
    pace.wake()
    pace.failed(probe(pace, clock), "no answer")
    assert pace.failures == 2
    assert pace.wait() <= 1.0


def test_waking_an_open_gate_changes_nothing(pace, clock):
    """While requests flow there is nothing to wake."""
    flow(pace, clock)
    pace.wake()
    assert (pace.gate, pace.allowance()) == (None, 32)


@pytest.mark.parametrize(("first", "then"), list(itertools.product(Gate, repeat=2)))
def test_an_answer_ends_every_pause(pace, clock, first, then):
    """Anything that Per answers to a probe lets requests flow again, whatever paused them."""
    pace.resume(first, "one reason", 3.0)
    clock.now += 3.0
    pace.resume(then, "another reason", 3.0)
    pace.answered(probe(pace, clock))
    assert (pace.gate, pace.reason, pace.failures) == (None, None, 0)
