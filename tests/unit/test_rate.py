"""The rate that Per takes, found out from its refusals, against simulated servers."""

import heapq
import random

import pytest

from perqueue._delivery.rate import RateCap


class Limiter:
    """A server with a token bucket, and a client that obeys a cap; time is simulated."""

    def __init__(self, rate, burst, round_trip, retry_after, in_flight=32):
        self.rate, self.burst, self.round_trip = rate, burst, round_trip
        self.retry_after, self.in_flight = retry_after, in_flight
        self.now = 0.0
        self.taken, self.refused = [], []
        self.cap = RateCap(lambda: self.now)
        self._tokens, self._filled_at = float(burst), 0.0
        self._paused_until, self._cuts = 0.0, 0
        self._events, self._under_way = [], 0
        self._chance = random.Random(7)

    def run(self, until):
        """Send as much as the cap, the pauses and the number in flight allow."""
        while self.now < until:
            while self._may_send():
                self.cap.sending()
                self._under_way += 1
                half = self.round_trip / 2 * self._chance.uniform(0.95, 1.05)
                heapq.heappush(self._events, (self.now + half, "arrives", self.now))
            times = [self._events[0][0]] if self._events else []
            if self._under_way < self.in_flight:
                times.append(max(self._paused_until, self.now + max(self.cap.wait(), 1e-4)))
            self.now = min(times)
            while self._events and self._events[0][0] <= self.now:
                self._happen(*heapq.heappop(self._events))

    def _may_send(self):
        free = self._under_way < self.in_flight and self.now >= self._paused_until
        return free and not self.cap.wait()

    def _happen(self, at, what, sent_at):
        if what == "arrives":
            self._tokens = min(self.burst, self._tokens + (at - self._filled_at) * self.rate)
            self._filled_at = at
            accepted = self._tokens >= 1
            self._tokens -= accepted
            heapq.heappush(
                self._events, (at + self.round_trip / 2, "accepted" if accepted else "refused", sent_at)
            )
            return
        self._under_way -= 1
        if what == "accepted":
            self.taken.append(at)
            self.cap.taken()
            self._cuts = 0
        else:
            self.refused.append(at)
            some_taken = self.cap.refused(sent_at)
            if self.retry_after:
                self._paused_until = at + self.retry_after
            elif not some_taken:
                self._cuts += 1
                self._paused_until = at + self._chance.uniform(0, 0.5 * 2**self._cuts)

    def between(self, start, end):
        """Return the share of the allowed rate that was used, and of the answers that were refusals."""
        taken = sum(start <= at < end for at in self.taken)
        refused = sum(start <= at < end for at in self.refused)
        return taken / (end - start) / self.rate, refused / (taken + refused)


@pytest.mark.parametrize("retry_after", [0, 1])
@pytest.mark.parametrize("round_trip", [0.002, 0.05])
@pytest.mark.parametrize("rate", [20, 100, 400])
def test_the_rate_settles_within_a_tenth_of_the_limit(rate, round_trip, retry_after):
    """Against a limiter with one second's bucket: 90 % of what it allows, and hardly a refusal."""
    limiter = Limiter(rate, rate, round_trip, retry_after)
    limiter.run(60)
    used, refused = limiter.between(20, 60)
    assert used > 0.9
    assert refused < 0.02


@pytest.mark.parametrize("retry_after", [0, 1])
@pytest.mark.parametrize(("burst", "least"), [(1, 0.5), (10, 0.8)])
def test_a_strict_limit_is_found_too(burst, least, retry_after):
    """Where hardly any two may come at once, most of what is allowed is used, and refusals stay rare."""
    limiter = Limiter(100, burst, 0.01, retry_after)
    limiter.run(120)
    used, refused = limiter.between(40, 120)
    assert used > least
    assert refused < 0.02


def test_a_limit_that_goes_is_forgotten():
    """When Per takes ten times as much, the rate gets there within a minute."""
    limiter = Limiter(50, 50, 0.01, 0)
    limiter.run(30)
    limiter.rate = limiter.burst = 500
    limiter.run(90)
    assert limiter.between(80, 90)[0] > 0.8


def test_time_without_requests_proves_nothing():
    """After an idle hour the limit that was found is still the limit; and one before the first refusal
    does not count against the rate that Per took.
    """
    limiter = Limiter(50, 50, 0.01, 0)
    limiter.now = 3600.0
    limiter.run(3630)
    known = limiter.cap.rate
    limiter.now += 3600
    limiter.run(limiter.now + 0.1)
    assert limiter.cap.rate == pytest.approx(known, rel=0.2)
    assert known > 30


def test_without_refusals_nothing_is_spaced_out():
    """As long as Per takes everything there is no rate, and no waiting."""
    cap = RateCap(lambda: 1.0)
    for _ in range(1000):
        cap.sending()
        cap.taken()
    assert cap.rate is None
    assert cap.wait() == 0


def test_refusals_of_one_round_count_once():
    """32 refusals in flight are one sign, not 32."""
    now = 10.0
    cap = RateCap(lambda: now)
    now = 20.0
    for _ in range(100):
        cap.taken()
    for _ in range(32):
        assert cap.refused(19.9)
    assert cap.rate == 10.0


def test_drainers_that_know_their_mean_come_to_equal_shares():
    """Where each approaches the mean of all, whatever they found by themselves, their sum stays."""
    now = 0.0
    caps = [RateCap(lambda: now) for _ in range(4)]
    for cap, taken in zip(caps, (80, 10, 7, 3), strict=True):
        cap.sending()
        for _ in range(taken):
            cap.taken()
    now = 1.0
    for cap in caps:
        cap.refused(sent_at=1.0)
    assert [cap.rate for cap in caps] == [80, 10, 7, 3]
    for _ in range(6):
        mean = sum(cap.rate for cap in caps) / 4
        for cap in caps:
            cap.approach(mean)
    assert [cap.rate for cap in caps] == pytest.approx([25] * 4, rel=0.2)


def test_a_mean_that_cannot_be_right_moves_little():
    """One drainer with a wild rate of its own makes no other send more than 2.5 times as much at once."""
    now = 0.0
    cap = RateCap(lambda: now)
    cap.approach(50.0)
    assert cap.rate is None  # Per has not asked this one for fewer
    cap.sending()
    for _ in range(20):
        cap.taken()
    now = 1.0
    cap.refused(sent_at=1.0)
    cap.approach(1e9)
    assert cap.rate == 50


def test_a_limit_that_is_doubted_is_searched_anew():
    """Where it turns out that one activity alone was refused, the rate doubles each second from there."""
    now = 0.0
    cap = RateCap(lambda: now)
    cap.doubt()
    assert cap.rate is None
    cap.sending()
    for _ in range(10):
        cap.taken()
    now = 1.0
    cap.refused(sent_at=1.0)
    cap.sending()
    now = 2.0
    cap.refused(sent_at=2.0)  # a limit that is known: from here on the rate grows slowly
    known = cap.rate
    cap.doubt()
    cap.sending()
    now = 5.0
    assert cap.rate == pytest.approx(8 * known)
