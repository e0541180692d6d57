"""Ten activities that Per never accepts, among a thousand."""

import json
import sqlite3
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner

from perqueue import ActivityRejected, DrainState, FlushTimeout, RetryPolicy
from perqueue.cli import main
from perqueue.sandbox import Refuse, Status

PATIENT = RetryPolicy(base=600, cap=600, activity_cap=600)
"""Whoever takes poison for an outage waits for minutes: no test passes by that."""
POISON = {
    "POISON_400": Refuse("bad_request", status=400),
    "POISON_413": Refuse("too_large", status=413),
    "POISON_500": Status(500, '{"ok": false, "message": "cannot count this user"}', "application/json"),
}


def users(poisons, count=1000):
    """Return user IDs with poison spread over them, the first ones healthy."""
    every = count // len(poisons)
    return [
        f"{poisons[number // every]}_{number}" if number % every == every // 2 else f"USER_{number}"
        for number in range(count)
    ]


def kinds(recorded):
    return Counter(user.rsplit("_", 1)[0] for user in recorded)


def log_of(outbox):
    """Return user, state and reason of everything that is not accepted, as an operator reads it."""
    with closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT user_id, state, reason FROM perqueue_activity_log WHERE state <> 'accepted'"
        )
        return {user.rsplit("_", 1)[0]: (state, reason) for user, state, reason in rows}


@pytest.fixture
def poisoned(per):
    """A Per that answers poison with 400, 413 and 500 for ever."""
    for start, fault in POISON.items():
        per.set_fault(fault, when=lambda activity, start=start: activity.user_id.startswith(start))
    return per


def test_ten_poison_activities_among_a_thousand(poisoned, make_queue, until, outbox):
    """990 arrive without any wait; the 400 and 413 are rejected with Per's words, the 500 stay pending with
    the reason of their latest attempt (invariants 3, 8).
    """
    per = poisoned
    recorded = users(["POISON_400", "POISON_413", "POISON_500"] * 3 + ["POISON_500"])
    assert kinds(recorded) == {"USER": 990, "POISON_400": 3, "POISON_413": 3, "POISON_500": 4}
    queue = make_queue(retry=PATIENT)
    for user in recorded:
        queue.record("GROUP_A", user)
    per.wait_for(990, timeout=60)
    until(lambda: (queue.stats().delivered, queue.stats().rejected, queue.stats().pending) == (990, 6, 4))
    assert per.requests == 1000  # one each: what waits, waits on its own account
    assert log_of(outbox) == {
        "POISON_400": ("rejected", "bad_request"),
        "POISON_413": ("rejected", "too_large"),
        "POISON_500": ("pending", "HTTP 500: cannot count this user"),
    }
    listed = CliRunner().invoke(main, ["rejected", "list", "--json", "--outbox", str(outbox)])
    assert Counter(each["reason"] for each in json.loads(listed.output)) == {"bad_request": 3, "too_large": 3}
    with pytest.raises(FlushTimeout, match="4 activities are not accepted") as late:
        queue.flush(timeout=0.2)
    assert (late.value.pending, "cannot count this user" in late.value.reason) == (4, True)
    per.clear_faults()
    with pytest.raises(ActivityRejected) as refused:
        queue.flush(timeout=20)
    assert len(refused.value.activities) == 6
    assert per.accepted == 994


def test_the_latest_reason_is_the_one_that_is_shown(poisoned, make_queue, until, outbox):
    """A 500 that changes its words shows the new ones (invariant 3)."""
    per = poisoned
    queue = make_queue(retry=RetryPolicy(base=0.02, cap=0.05, activity_cap=0.05))
    for user in ("USER_1", "POISON_500_1", "USER_2"):
        queue.record("GROUP_A", user)
    until(lambda: "cannot count" in str(log_of(outbox)))
    per.clear_faults()
    per.set_fault(Status(500, "", "text/plain"), when=lambda activity: "POISON" in activity.user_id)
    until(lambda: log_of(outbox) == {"POISON_500": ("pending", "HTTP 500")})
    per.clear_faults()
    queue.flush(10)
    assert per.unique("GROUP_A") == 3


def test_the_check_sees_a_delay(poisoned, make_queue, until):
    """A control: if poison were an outage (nothing else has ever got through), the rest would wait."""
    queue = make_queue(retry=PATIENT, max_in_flight=1)
    queue.record("GROUP_A", "POISON_500_0")
    poisoned.wait_for_requests(1)
    until(lambda: queue.stats().state is DrainState.BACKING_OFF)
    assert queue.stats().resumes_at > datetime.now(UTC)
