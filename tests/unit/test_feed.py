"""What is sent next: in its turn, as a probe, and when there is more than memory may hold."""

import math
from types import SimpleNamespace

import pytest

from perqueue import OutboxError, RetryPolicy
from perqueue._activity import Activity
from perqueue._delivery.feed import Feed
from perqueue._delivery.pace import Pace
from perqueue._stats import Gate

NOW = 1_000.0
CLOCK = SimpleNamespace(monotonic=lambda: NOW, time_ms=lambda: int(NOW * 1000))


def activity(number, attempts=0):
    return Activity(
        id=number, billing_id="G", user_id="U", activity_type_id="T", recorded_at=0, attempts=attempts
    )


class Backlog:
    """An outbox, as far as a feed looks: fresh activities, and some whose own wait is over."""

    claim_batch = 1

    def __init__(self, fresh=(), offenders=()):
        self.fresh = [activity(number) for number in fresh]
        self.offenders = [activity(number, attempts=3) for number in offenders]
        self.error = None

    def claim(self, after, limit):
        if self.error is not None:
            raise self.error
        return [each for each in self.fresh if each.id > after][:limit]

    def next_due(self):
        return 0 if self.offenders else None

    def claim_due(self, now, farthest, limit, outstanding):
        return [each for each in self.offenders if each.id not in outstanding][:limit]


@pytest.fixture
def pace():
    full = Pace(RetryPolicy(), 32, 10.0, CLOCK.monotonic)
    for _ in range(40):
        full.answered(NOW)
    return full


def feed_of(backlog, pace):
    feed = Feed(backlog, pace, CLOCK, 900.0, 0)
    feed.fill()
    return feed


def drawn(feed, count):
    return [feed.next().id for _ in range(count)]


def test_known_offenders_leave_room_for_others(pace):
    """However many wait for another try, what is recorded now is claimed with the next look (invariant 8)."""
    backlog = Backlog(offenders=range(1, 1_001))
    feed = feed_of(backlog, pace)
    offenders = len(feed)
    assert offenders > 0
    backlog.fresh = [activity(2_000)]
    feed.fresh = True
    feed.fill()
    assert drawn(feed, offenders + 1)[-1] == 2_000


def test_what_could_not_be_claimed_is_claimed_later(pace):
    """An outbox that cannot be read for once hides nothing that was recorded (invariant 3)."""
    backlog = Backlog(fresh=[1, 2, 3])
    backlog.error = OutboxError("locked")
    feed = Feed(backlog, pace, CLOCK, 900.0, 0)
    with pytest.raises(OutboxError):
        feed.fill()
    backlog.error = None
    feed.fill()
    assert drawn(feed, 3) == [1, 2, 3]


def test_an_outage_is_probed_from_both_ends(pace):
    """However many bad ones lie before a good one, or behind it, it is found (invariant 8)."""
    feed = feed_of(Backlog(fresh=range(1, 51)), pace)
    pace.resume(Gate.BACKING_OFF, "no answer", 0.0)
    assert sorted(drawn(feed, 6)) == [1, 2, 3, 48, 49, 50]


def test_what_has_never_failed_probes_first(pace):
    """A known offender says little of Per: as long as there is another, that one asks."""
    feed = feed_of(Backlog(fresh=[10, 11], offenders=[1, 2]), pace)
    pace.resume(Gate.BACKING_OFF, "no answer", 0.0)
    assert sorted(drawn(feed, 2)) == [10, 11]


def test_a_newcomer_asks_at_once_when_one_alone_has_failed(pace):
    """One failure is no outage: whatever is recorded next does not wait for its backoff (invariant 8)."""
    backlog = Backlog(fresh=[1])
    feed = feed_of(backlog, pace)
    feed.suspect(feed.next())
    pace.resume(Gate.BACKING_OFF, "no answer", 60.0)
    backlog.fresh.append(activity(2))
    feed.look_again()
    feed.fill()
    assert (pace.allowance(), feed.next().id) == (1, 2)


def test_after_an_outage_everything_is_sent_in_its_turn(pace):
    """Those that failed meanwhile are not behind what was recorded after them."""
    feed = feed_of(Backlog(fresh=range(1, 11)), pace)
    for _ in range(3):
        feed.suspect(feed.next())
    feed.acquit()
    assert drawn(feed, 10) == list(range(1, 11))


def test_suspects_are_bounded(pace):
    """However long an outage lasts, only so many that failed in it are held in memory (invariant 12)."""
    feed = feed_of(Backlog(fresh=range(1, 101)), pace)
    for _ in range(63):
        feed.suspect(feed.next())
    assert not feed.crowded()
    feed.suspect(feed.next())
    assert feed.crowded()


def test_of_what_has_left_nothing_is_remembered(pace):
    """Memory holds what is claimed, and nothing of what was settled (invariant 12)."""
    feed = feed_of(Backlog(fresh=[1, 2]), pace)
    first = feed.next()
    feed.suspect(first)
    assert feed.failed_at(first) == NOW
    assert feed.watermark({1}) == 1
    feed.leave([1])
    assert feed.failed_at(first) == math.inf
    assert feed.watermark({2}) == 2
