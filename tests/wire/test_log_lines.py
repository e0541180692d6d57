"""What the log says: each trouble once, at the right level, with its remedy, and that it is over."""

import logging
import re

import pytest

from perqueue import DrainState, OutboxError, PerQueue, PerQueueError, RetryPolicy
from perqueue._lock import drain_lock
from perqueue.sandbox import BadToken, Latency, RateLimited, Refuse, Status
from tests.helpers import Child
from tests.outbox.test_trouble import LOCKER

QUICK = RetryPolicy(base=0.02, cap=0.05)
BACK = r"INFO delivering again after \d+ s: [\d,]+ pending"


@pytest.fixture
def lines(caplog):
    """The lines of perqueue's log, up to INFO: `LEVEL text`."""
    caplog.set_level(logging.INFO, "perqueue")
    return lambda: [f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name == "perqueue"]


def record(queue, count):
    for number in range(count):
        queue.record("SECRET_GROUP", f"SECRET_USER_{number}")


def test_an_outage_is_a_warning_and_its_end_is_told(per, make_queue, until, lines):
    """However many requests fail, an outage costs two lines: it mends itself, so it is a warning."""
    queue = make_queue(retry=QUICK)
    for said in (0, 2):
        per.set_fault(Status(503))
        record(queue, 100)
        until(lambda said=said: len(lines()) == said + 1)
        per.wait_for_requests(per.requests + 5, timeout=20)
        per.clear_faults()
        queue.flush(20)
        until(lambda said=said: len(lines()) == said + 2)
    for away, back in (lines()[:2], lines()[2:]):
        assert re.fullmatch(r"WARNING Per does not answer \(HTTP 503.*\): everything is kept, retrying", away)
        assert re.fullmatch(BACK, back)


def test_a_bad_token_is_an_error_with_its_remedy(per, make_queue, until, lines):
    """Somebody has to act: one error that says how, and one line when it was done."""
    per.set_fault(BadToken())
    queue = make_queue()
    record(queue, 100)
    for _ in range(3):
        with pytest.raises(PerQueueError):
            queue.flush(5)
    per.clear_faults()
    queue.flush(20)
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error.startswith("ERROR Per refused the activity token (invalid_auth_token); everything is kept")
    assert "scope activity" in error
    assert re.fullmatch(BACK, back)


def test_a_refusal_of_everything_is_an_error_with_its_remedy(per, make_queue, until, lines):
    """Twenty refusals in a row are one line that says what is wrong as a rule."""
    per.set_fault(Refuse("unknown_activity_type"))
    queue = make_queue()
    record(queue, 60)
    for _ in range(3):
        with pytest.raises(PerQueueError):
            queue.flush(5)
    per.clear_faults()
    queue.flush(20)
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error.startswith("ERROR Per refused 20 activities in a row for one reason")
    assert "a wrong activity type: correct that" in error
    assert re.fullmatch(BACK, back)


def test_a_probe_that_is_refused_during_a_pause_is_an_attempt(per, make_queue, until, outbox):
    """Each request that Per refused is in the history of its activity, also while delivery is paused."""
    per.set_fault(Refuse("unknown_activity_type"))
    queue = make_queue(max_in_flight=1)
    record(queue, 21)
    with pytest.raises(PerQueueError):
        queue.flush(5)
    seen = per.requests
    with pytest.raises(PerQueueError):
        queue.flush(5)
    assert per.requests > seen
    until(lambda: sum(each.attempts for each in queue.history()) == per.requests)


def test_a_long_retry_after_is_a_warning_and_short_ones_are_not_told(per, make_queue, until, lines):
    """How Per limits the rate is daily life; a wait of minutes is worth a line."""
    per.set_fault(RateLimited(1), times=1)
    queue = make_queue(retry=QUICK)
    record(queue, 1)
    queue.flush(10)
    assert lines() == []
    per.set_fault(RateLimited(60), times=1)
    record(queue, 2)
    until(lines)
    (warning,) = lines()
    assert re.fullmatch(
        r"WARNING Per asks to wait for 60 s \(HTTP 429.*\): everything is kept till then", warning
    )


def test_a_locked_file_is_an_error_and_its_end_is_told(per, make_queue, outbox, until, lines):
    """While another program locks the file the drain says so once, and once that it goes on."""
    per.set_fault(Latency(0.01))
    queue = make_queue(max_in_flight=8)
    record(queue, 400)
    per.wait_for(40)
    with Child(LOCKER, outbox, isolated=True) as locker:
        locker.expect("locked")
        until(lines, 30)
        locker.tell("release")
        locker.succeed()
    queue.flush(20)
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error.startswith("ERROR delivery waits until the outbox works again: ")
    assert "another process held its lock for over 1 s" in error
    assert back.startswith("INFO the outbox works again after")


def test_outcomes_that_cannot_be_written_are_one_error(per, make_queue, until, lines):
    """A disk that takes no outcome is one line with the error's own remedy, and one when it does again."""
    queue = make_queue()
    settle, tries = queue._outbox.settle, []

    def refuse(*_, **__):
        tries.append(1)
        raise OutboxError("the disk is full: free space")

    queue._outbox.settle = refuse
    record(queue, 1)
    until(lambda: len(tries) == 3)
    queue._outbox.settle = settle
    queue.flush(10)
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error == "ERROR delivery waits until the outbox works again: the disk is full: free space"
    assert re.fullmatch(r"INFO the outbox works again after \d+ s: delivery goes on", back)


def test_an_outbox_that_cannot_be_used_at_first_is_one_error(per, make_queue, until, lines):
    """A disk that is full before delivery begins is told once, shown by stats(), and its end is told."""
    queue = make_queue()
    set_drainer = queue._outbox.set_drainer
    queue._outbox.set_drainer = lambda *_: (_ for _ in ()).throw(OutboxError("the disk is full: free space"))
    record(queue, 1)
    until(lambda: queue.stats().state is DrainState.PAUSED)
    assert queue.stats().reason == "the disk is full: free space"
    queue._outbox.set_drainer = set_drainer
    queue.flush(10)
    assert queue.stats().reason is None
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error == "ERROR the outbox cannot be used; trying again: the disk is full: free space"
    assert back.startswith("INFO the outbox works again after")


def test_a_sync_that_fails_is_one_error_and_its_end_is_told(make_queue, until, lines):
    """What a power cut would take is told once, with the remedy, and once that it is safe again."""
    queue = make_queue(drain=False)
    keeper = queue._outbox._disk
    sync, tries = keeper.sync, []

    def fail():
        tries.append(1)
        raise OSError(28, "No space left on device")

    keeper.sync = fail
    record(queue, 1)
    until(lambda: len(tries) > 1)
    keeper.sync = sync
    until(lambda: len(lines()) > 1)
    error, back = lines()
    assert error.startswith("ERROR syncing or checkpointing fails, and is tried again; a power cut may cost")
    assert "free space" in error
    assert re.fullmatch(r"INFO outbox .*: what was recorded is safe on disk again after \d+ s", back)


def test_a_lock_that_cannot_be_taken_is_one_error_and_its_end_is_told(per, make_queue, until, lines):
    """Whatever the operating system says against the drain lock is told once, and once that it is over."""
    queue = make_queue()
    trouble = [True]

    class Lock(type(drain_lock(queue._settings.outbox))):
        def acquire(self, *args, **more):
            if trouble:
                raise PermissionError(13, "Permission denied")
            return super().acquire(*args, **more)

    lock = drain_lock(queue._settings.outbox)
    lock.__class__ = Lock
    queue._worker._new_lock = lambda: lock
    queue.record("GROUP_A", "USER_1")
    until(lines)
    until(lambda: queue._worker.trouble)
    trouble.clear()
    queue.flush(10)
    until(lambda: len(lines()) >= 2)
    error, back = lines()
    assert error.startswith("ERROR the drain lock cannot be taken, so this process delivers nothing")
    assert "owner and mode" in error
    assert re.fullmatch(r"INFO the drain lock can be taken again after \d+ s", back)


def test_a_callback_that_always_fails_is_told_once_and_says_no_id(per, make_queue, until, lines):
    """A mistake in a callback is one line, which shows where it is, and no ID that its text may hold."""
    per.set_fault(Refuse("unknown"), when=lambda activity: activity.user_id.endswith("7"))

    def fail(activity):
        raise KeyError(activity.user_id)

    queue = make_queue(on_rejected=fail)
    record(queue, 50)
    with pytest.raises(PerQueueError):
        queue.flush(10)
    until(lines)
    (error,) = lines()
    assert "on_rejected raised KeyError" in error
    assert "in fail" in error
    assert "SECRET" not in error


def test_a_drain_that_fails_again_and_again_is_told_once(per, options, outbox, until, lines):
    """A mistake of perqueue's own that comes each second is not a traceback each second."""
    with PerQueue(outbox, **options) as queue:
        set_drainer, calls, user_id = queue._outbox.set_drainer, [], "SECRET_USER"

        def fail(*given):
            calls.append(given)
            if len(calls) < 3:
                raise ZeroDivisionError(user_id)
            set_drainer(*given)

        queue._outbox.set_drainer = fail
        queue.record("GROUP_A", "USER_1").wait(20)
    (error,) = lines()
    assert error.startswith("ERROR the drain has failed and starts again, everything is kept; please report")
    assert "ZeroDivisionError" in error
    assert "SECRET" not in error
