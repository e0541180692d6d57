"""`coalesce`: at most one delivery for each key and window, and no report changes."""

import sqlite3
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perqueue import ActivityRejected, InvalidActivity, OutboxError, PerQueue, QueueClosed
from perqueue._clock import Clock
from perqueue._coalescer import _MOST_KEYS, Coalescer
from perqueue._outbox import SQLiteOutbox
from perqueue.sandbox import Refuse, Status
from tests.helpers import Child, environment

HOUR = timedelta(hours=1)
# The drain, whose clock is the machine's, forgets windows that ended over an hour ago.
BEGINNING = datetime.now(UTC).replace(minute=0, second=0, microsecond=0).timestamp()


@pytest.fixture
def wall():
    """A wall clock that a test moves: seconds since the epoch."""

    class Wall:
        now = BEGINNING

        def __call__(self):
            return self.now

    return Wall()


@pytest.fixture
def coalescing(make_queue, wall):
    """Make queues with `coalesce` whose wall clock stands still."""

    def make(**given):
        queue = make_queue(**{"coalesce": HOUR, **given})
        queue._clock = Clock(wall=wall)
        return queue

    return make


def test_one_delivery_for_each_key_and_window(per, coalescing, wall):
    """However often a key is recorded in a window, Per hears of it once; others are others."""
    queue = coalescing()
    for minutes in (0, 1, 30, 59):
        wall.now = BEGINNING + 60 * minutes
        for _ in range(5):
            queue.record("GROUP_A", "USER_1")
    queue.record("GROUP_B", "USER_1")
    queue.record("GROUP_A", "USER_2")
    queue.record("GROUP_A", "USER_1", activity_type_id="OTHER")
    queue.flush(10)
    assert per.requests == 4
    wall.now = BEGINNING + 3600
    queue.record("GROUP_A", "USER_1")
    queue.flush(10)
    assert per.requests == 5


def test_the_receipt_is_that_of_the_first(coalescing):
    """Whoever records what stands already gets its receipt, and can wait for it."""
    queue = coalescing()
    first = queue.record("GROUP_A", "USER_1")
    again = queue.record("GROUP_A", "USER_1")
    assert again.id == first.id
    assert again.wait(10) == first.wait(10)


def test_threads_share_a_window(per, coalescing):
    """Eight threads that record the same hundred users are a hundred deliveries."""
    queue = coalescing()
    started = threading.Barrier(8)

    def work(_):
        started.wait()
        return [queue.record("GROUP_A", f"USER_{number}").id for number in range(100)]

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(work, range(8)))
    queue.flush(20)
    assert all(each == ids[0] for each in ids)
    assert per.requests == 100


def test_processes_and_restarts_share_a_window(per, coalescing, outbox):
    """Two processes on one outbox, and one that starts later, add no delivery (a day's window)."""
    script = """
        from datetime import timedelta
        with PerQueue(coalesce=timedelta(days=1)) as queue:
            for number in range(50):
                queue.record("GROUP_A", f"USER_{number}")
            say(queue.stats().delivered)
    """
    env = environment(outbox, per)
    for _ in range(2):
        with Child(script, env=env) as one, Child(script, env=env) as other:
            one.succeed(30)
            other.succeed(30)
    # Midnight may have come in between.
    assert per.requests in {50, 100}
    assert per.unique("GROUP_A") == 50


def test_a_refused_one_stands_for_no_other(per, coalescing):
    """What Per refused is recorded anew as soon as that is known (here: told by flush())."""
    per.set_fault(Refuse("unknown_user"), times=1)
    queue = coalescing()
    first = queue.record("GROUP_A", "USER_1")
    with pytest.raises(ActivityRejected):
        queue.flush(10)
    second = queue.record("GROUP_A", "USER_1")
    assert second.id != first.id
    queue.flush(10)
    assert per.unique("GROUP_A") == 1


def test_one_that_another_process_has_refused_stands_for_no_other(per, make_queue, coalescing, wall):
    """A process that only records learns of a refusal within a tenth of a second."""
    per.set_fault(Refuse("unknown_user"), times=1)
    recorder = coalescing(drain=False)
    first = recorder.record("GROUP_A", "USER_1")
    drainer = make_queue()
    with pytest.raises(ActivityRejected):
        drainer.flush(10)
    wall.now += 0.1
    assert recorder.record("GROUP_A", "USER_1").id != first.id


def test_a_damaged_one_stands_for_no_other(per, coalescing, outbox):
    """A row that cannot be delivered any more swallows nothing."""
    recorder = coalescing(drain=False)
    recorder.record("GROUP_A", "USER_1")
    recorder.close()
    with closing(sqlite3.connect(outbox)) as connection, connection:
        connection.execute("UPDATE perqueue_activity SET user_id = 'SOMEBODY ELSE'")
    queue = coalescing()
    with pytest.raises(OutboxError, match="damaged"):
        queue.flush(10)
    queue.record("GROUP_A", "USER_1")
    queue.flush(10)
    assert per.unique("GROUP_A") == 1


@pytest.mark.parametrize("user", ["USER_1", "USER_2"])
def test_a_finalizer_within_a_transaction_is_told(coalescing, monkeypatch, user):
    """What is not committed yet stands for nothing, and the error names the cause, not a damaged file."""
    queue = coalescing(drain=False)
    errors = []

    committing = queue._outbox._committing

    @contextmanager
    def interrupted(connection):
        with committing(connection):
            yield
            if not errors:
                with pytest.raises(OutboxError) as caught:
                    queue.record("GROUP_A", user)
                errors.append(str(caught.value))

    monkeypatch.setattr(queue._outbox, "_committing", interrupted)
    queue.record("GROUP_A", "USER_1")
    (error,) = errors
    assert "finalizer" in error
    assert "damaged" not in error
    assert queue.stats().pending == 1


def test_one_that_waits_stands_for_the_others(per, coalescing):
    """During an outage, too, a key is stored once."""
    per.set_fault(Status(500))
    queue = coalescing()
    for _ in range(50):
        queue.record("GROUP_A", "USER_1")
    assert queue.stats().pending == 1


def test_what_cannot_be_sent_is_refused_all_the_same(coalescing):
    """A wrong ID is `InvalidActivity`, and a closed queue `QueueClosed`, also for a known key."""
    queue = coalescing()
    queue.record("GROUP_A", "USER_1")
    for wrong in (17, None, "", ["USER_1"], {}, "a\0b"):
        with pytest.raises(InvalidActivity):
            queue.record("GROUP_A", wrong)
    queue.close()
    with pytest.raises(QueueClosed):
        queue.record("GROUP_A", "USER_1")


def test_windows_expire(tmp_path):
    """Keys of windows that ended are forgotten, a few at a time; those of the current one stay."""
    outbox = SQLiteOutbox(tmp_path / "a.db", None)
    for number in range(10):
        outbox.append_once(("G", f"USER_{number}", "T"), (0, 1000), 500)
    standing = outbox.append_once(("G", "USER", "T"), (1000, 2000), 1500)
    assert outbox.expire(1500, 6)
    assert not outbox.expire(1500, 6)
    assert outbox.append_once(("G", "USER", "T"), (1000, 2000), 1600) == standing
    assert outbox.append_once(("G", "USER_1", "T"), (0, 1000), 700) > standing
    outbox.close()


def test_memory_is_bounded_whatever_is_recorded():
    """At most 100,000 keys are remembered in memory; the outbox remembers the rest (invariant 12)."""

    class Numbers:
        last = 0

        def refusals(self):
            return 0

        def append_once(self, key, window, recorded_at):
            self.last += 1
            return self.last

    coalescer = Coalescer(HOUR, Numbers())
    for number in range(250_000):
        key = ("GROUP", f"USER_{number}", "TYPE")
        if coalescer.standing(key, 10) is None:
            coalescer.record(key, 10)
    assert len(coalescer._remembered.ids) <= _MOST_KEYS


MOMENTS = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.sampled_from("AB"),
        st.sampled_from("123"),
        st.sampled_from(["LOGIN", "EXPORT"]),
    ),
    max_size=60,
)


@settings(max_examples=40)
@given(moments=MOMENTS, minutes=st.sampled_from([1, 30, 60, 240, 1440]))
def test_no_report_that_is_aligned_to_windows_changes(moments, minutes):
    """Unique users of each (window, type, billing ID) are the same with coalescing and without, and no key
    is delivered twice in a window.
    """
    window = timedelta(minutes=minutes)
    now, everything, delivered = BEGINNING, set(), []
    options = {"coalesce": window, "drain": False, "base_url": "http://127.0.0.1:9"}
    with tempfile.TemporaryDirectory() as folder, PerQueue(Path(folder, "a.db"), **options) as queue:
        for passed, billing_id, user_id, kind in moments:
            now += 60 * passed
            queue._clock = Clock(wall=lambda now=now: now)
            queue.record(billing_id, user_id, activity_type_id=kind)
            everything.add((now // window.total_seconds(), billing_id, user_id, kind))
        for activity in queue._outbox.claim(0, 1000):
            at = activity.recorded_at / 1000 // window.total_seconds()
            delivered.append((at, activity.billing_id, activity.user_id, activity.activity_type_id))
    assert sorted(delivered) == sorted(everything)


def test_what_is_recorded_after_a_flush_that_raised_stands_for_itself(per, coalescing):
    """Once a flush has told of a refusal, though by another process, the same key is recorded anew."""
    drainer, queue = coalescing(), coalescing(drain=False)
    drainer.record("GROUP_A", "USER_2")  # it delivers from its first one on
    drainer.flush(20)
    per.set_fault(Refuse("unknown_user"))
    first = queue.record("GROUP_A", "USER_1")
    with pytest.raises(ActivityRejected):
        queue.flush(20)
    assert queue.record("GROUP_A", "USER_1").id > first.id
    drainer.close()


class Counted:
    """An outbox that gives numbers, and in which something happens once before the number is handed back."""

    def __init__(self):
        self.given = self.refused = 0
        self.meanwhile = None

    def refusals(self):
        return self.refused

    def append_once(self, key, window, now):
        self.given += 1
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return self.given


def test_what_is_refused_before_its_recorder_goes_on_is_not_remembered():
    """A refusal between the commit and the return of `record()` still lets the next one stand for itself."""
    outbox = Counted()
    coalescer = Coalescer(HOUR, outbox)
    assert coalescer.standing("key", 10) is None

    def refuse():
        outbox.refused += 1
        coalescer.forget()
        coalescer.standing("another", 500)  # another thread looks around

    outbox.meanwhile = refuse
    assert coalescer.record("key", 10) == 1
    assert coalescer.standing("key", 510) is None
    assert coalescer.record("key", 510) == 2
    assert coalescer.standing("key", 520) == 2


def test_an_activity_stands_in_its_own_window_only():
    """A window that ends between the look and the commit, or between commit and return, misleads nobody."""
    coalescer = Coalescer(HOUR, outbox := Counted())
    next_window = 3_600_000
    assert coalescer.standing("key", 10) is None
    coalescer.record("key", next_window)
    assert coalescer.standing("key", 20) is None
    outbox.meanwhile = lambda: coalescer.standing("another", next_window)
    coalescer.record("key", 30)
    assert coalescer.standing("key", next_window) is None
