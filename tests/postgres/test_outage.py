"""What several drainers do together when nothing gets through: one asks for all."""

import asyncio
import threading
import time

import httpx
import pytest

from perqueue import ActivityRejected, AuthenticationError, DrainState, RetryPolicy
from perqueue.sandbox import RateLimited, Refuse
from tests.helpers import until

QUICK = RetryPolicy(base=0.2, cap=0.4)


def record(queue, count, prefix="USER"):
    for number in range(count):
        queue.record("GROUP", f"{prefix}_{number}")


class Away(httpx.AsyncBaseTransport):
    """A Per that takes its time and does not answer, until it is back; counts who asks at once."""

    def __init__(self):
        self.back = False
        self.asking = self.most = self.requests = 0
        self._lock = threading.Lock()

    def reset(self):
        with self._lock:
            self.most = self.requests = 0

    async def handle_async_request(self, request):
        with self._lock:
            self.asking += 1
            self.requests += 1
            self.most = max(self.most, self.asking)
        try:
            await asyncio.sleep(0.1)
        finally:
            with self._lock:
                self.asking -= 1
        if not self.back:
            return httpx.Response(503)
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "T"}})


@pytest.mark.usefixtures("quick_leases")
def test_one_drainer_of_all_probes_at_a_time(make_queue):
    """In an outage at most one probe of the whole fleet is in flight, and all deliver again afterwards."""
    per = Away()
    queues = [make_queue(transport=per, retry=QUICK, exit_timeout=0) for _ in range(4)]
    for number, queue in enumerate(queues):
        record(queue, 150, f"Q{number}")
        queue._follower().start()
    until(lambda: all(queue._worker.pace.gate for queue in queues), "all have noticed")
    until(lambda: per.asking == 0, "nothing is in flight")
    per.reset()
    until(lambda: per.requests >= 4, "four probes", 20)
    assert per.most == 1
    per.back = True
    for queue in queues:
        queue.flush(30)
    assert queues[0].stats().delivered == 600


@pytest.mark.usefixtures("quick_leases")
def test_a_drainer_that_alone_gets_no_answers_makes_way(per, make_queue):
    """What a drainer has claimed that does not reach Per is soon delivered by one that does, which had
    nothing to do; and once it gets through again it delivers, too.
    """
    away = Away()
    record(make_queue(drain=False), 50)  # all there before the first claim, which takes them all
    cut_off = make_queue(transport=away, retry=QUICK, exit_timeout=0)
    until(lambda: cut_off._worker.pace.failures > 0, "it gets no answers")
    owned = "SELECT count(*) FROM perqueue_pending WHERE owner IS NOT NULL"
    until(lambda: cut_off._outbox._rows(owned) == [(50,)], "it has claimed them all")
    other = make_queue()
    other._follower().start()
    other.flush(20)
    assert per.unique("GROUP") == 50
    away.back = True
    other.close()
    record(cut_off, 5, "BACK")
    cut_off.flush(20)
    assert cut_off.stats().delivered == 55


def test_a_probe_of_a_drainer_that_dies_is_made_by_another(per, make_queue, sql):
    """Whoever won the probe and was never heard of again stands in the others' way for its lease only."""
    queue = make_queue(drain=False)
    record(queue, 5)
    sql(
        "UPDATE perqueue_outbox SET hold = 'backing_off', hold_reason = 'gone', hold_wait_ms = 0, holds = 1,"
        " hold_until = clock_timestamp(), probe_owner = 1,"
        " probe_until = clock_timestamp() + interval '1 second'"
    )
    began = time.monotonic()
    drainer = make_queue()
    drainer.flush(20)
    assert time.monotonic() - began > 0.5
    assert sql("SELECT hold FROM perqueue_outbox") == [(None,)]


def test_a_retry_after_holds_for_all(per, make_queue):
    """What Per asked one drainer to wait, all wait (invariant 6)."""
    first, second = make_queue(), make_queue()
    per.set_fault(RateLimited(1), times=1)
    first.record("GROUP", "FIRST")
    until(lambda: first.stats().state is DrainState.BACKING_OFF, "it waits")
    second.record("GROUP", "SECOND")
    second._follower().start()
    second.flush(20)
    asked, *later = [request.at for request in per.request_log]
    assert later
    assert all((at - asked).total_seconds() > 0.9 for at in later)


def test_what_all_drainers_had_refused_is_pending_again(per, make_queue, monkeypatch):
    """When everything is refused, what each drainer was told before they all paused goes back to pending."""
    per.set_fault(Refuse("unknown_type"))
    few, many, recorder = make_queue(), make_queue(), make_queue(drain=False)
    with monkeypatch.context() as patch:
        patch.setattr(many._outbox, "claim", lambda after, limit: [])
        many._follower().start()
        until(lambda: many._worker._drain, "it drains, and gets nothing")
        record(few, 5)
        until(lambda: recorder.stats().rejected == 5, "too few to tell")
    monkeypatch.setattr(few._outbox, "claim", lambda after, limit: [])
    record(recorder, 100)
    with pytest.raises(ActivityRejected, match="every activity"):
        many.flush(20)
    until(lambda: recorder.stats().rejected == 0, "all are taken back")
    assert recorder.stats().pending == 105
    assert recorder.stats().state is DrainState.PAUSED


def test_a_drainer_with_a_bad_token_leaves_its_work_to_others(per, make_queue):
    """What a drainer with a refused token had claimed is delivered by one with a good token, soon."""
    good = make_queue()
    good.record("GROUP", "BEFORE").wait(10)
    bad = make_queue(activity_token="wrong")
    record(bad, 50)
    good.flush(10)
    assert per.accepted == 51
    assert good.stats().state is DrainState.IDLE


def test_bad_tokens_everywhere_are_told(per, make_queue):
    """When no drainer has a good token, flush says so."""
    one, other = make_queue(activity_token="wrong"), make_queue(activity_token="worse")
    record(one, 5)
    record(other, 5)
    with pytest.raises(AuthenticationError):
        one.flush(15)
    assert one.stats().pending == 10


@pytest.mark.usefixtures("quick_leases")
def test_a_sleeping_drainer_is_woken(per, make_queue, monkeypatch):
    """An activity that a process without drain records is delivered at once, though every drainer sleeps."""
    from perqueue._outbox.postgres import leases

    monkeypatch.setattr(leases, "_AWAKE", 0.2)
    drainer, recorder = make_queue(), make_queue(drain=False)
    drainer.record("GROUP", "FIRST").wait(10)
    took = 60.0
    for number in range(3):
        until(lambda: drainer._outbox._asleep, "it sleeps")
        began = time.monotonic()
        recorder.record("GROUP", f"WAKE_{number}").wait(10)
        took = min(took, time.monotonic() - began)
        if took < 0.6:  # a busy machine is late once in a while
            break
    assert took < 0.6
