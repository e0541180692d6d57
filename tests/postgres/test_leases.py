"""Whose an activity is: claims, leases, and the fence between a late drainer and its successor."""

from contextlib import closing

import pytest

from perqueue._activity import Event, Settlement, State
from perqueue._address import DatabaseURL
from perqueue._answers import may_have_counted
from perqueue._outbox import Load, open_trail

ORIGIN = "https://per.example"


@pytest.fixture
def drainers(outbox):
    """Three drainers of one outbox that share nothing else."""
    from perqueue._outbox.postgres.outbox import PostgresOutbox

    opened = [PostgresOutbox(DatabaseURL(outbox), ORIGIN) for _ in range(3)]
    for each in opened:
        each.begin_term()
    yield opened
    for each in opened:
        each.close()


def append(outbox, count):
    return [outbox.append("GROUP", f"USER_{number}", "TYPE", 1_000) for number in range(count)]


def settle(outbox, activities, event=Event.ACCEPT, **more):
    settlements = [
        Settlement(
            activity=each, event=event, answered_at=2_000, **{"transaction_id": "T", "reason": "R"} | more
        )
        for each in activities
    ]
    outbox.settle(settlements, drained_through=0, refusals=(0, None))


def ids(activities):
    return [activity.id for activity in activities]


def kill(sql, outbox):
    """Let a drainer's lease be over, as far as the others can see."""
    sql(f"UPDATE perqueue_drainer SET alive_until = clock_timestamp() WHERE owner = {outbox._owner}")


def test_each_activity_is_claimed_by_one(drainers):
    """Drainers that claim in turn get different activities, the oldest first."""
    first, second, third = drainers
    recorded = append(first, 30)
    assert ids(first.claim(0, 10)) == recorded[:10]
    assert ids(second.claim(0, 10)) == recorded[10:20]
    assert ids(third.claim(0, 100)) == recorded[20:]
    assert ids(first.claim(0, 10)) == []


def test_a_claim_outlives_only_its_lease(drainers, sql):
    """What a drainer claimed is nobody else's until its lease is over, and anybody's from then on."""
    dead, heir, _ = drainers
    recorded = append(dead, 5)
    dead.claim(0, 10)
    heir._sweep_at = float("-inf")
    assert heir.claim(0, 10) == []
    kill(sql, dead)
    heir._sweep_at = float("-inf")
    assert ids(heir.claim(recorded[-1], 10)) == recorded


@pytest.mark.parametrize("fenced", [True, False])
def test_a_late_drainer_settles_nothing(drainers, sql, monkeypatch, fenced):
    """Whose activities were taken over writes no outcome of them; without the fence it would."""
    from perqueue._outbox.postgres import settling

    if not fenced:
        monkeypatch.setattr(settling, "_SETTLE", settling._SETTLE.replace("AND p.owner = %(owner)s", ""))
    late, heir, _ = drainers
    recorded = append(late, 3)
    claimed = late.claim(0, 10)
    kill(sql, late)
    heir._sweep_at = float("-inf")
    taken = heir.claim(0, 10)
    assert ids(taken) == recorded
    settle(late, claimed, Event.REJECT)
    assert (late.settled(recorded) == {}) is fenced
    assert (sorted(late.lost) == recorded) is fenced
    if fenced:
        settle(heir, taken)
        assert {outcome.state for outcome in heir.settled(recorded).values()} == {State.ACCEPTED}
        assert (heir.position().accepted, heir.position().rejected, heir.position().pending) == (3, 0, 0)


@pytest.mark.parametrize("fenced", [True, False])
def test_a_late_drainer_defers_nothing(drainers, sql, monkeypatch, fenced):
    """A deferral by whoever has lost an activity takes it from nobody; without the fence it would."""
    from perqueue._outbox.postgres import settling

    if not fenced:
        unfenced = settling._SETTLE.replace("p.id = a.id AND p.owner = %(owner)s", "p.id = a.id")
        monkeypatch.setattr(settling, "_SETTLE", unfenced)
    late, heir, _ = drainers
    append(late, 1)
    claimed = late.claim(0, 1)
    kill(sql, late)
    heir._sweep_at = float("-inf")
    taken = heir.claim(0, 1)
    settle(late, claimed, Event.DEFER, not_before=10_000)
    assert (len(late.lost) == 1) is fenced
    if fenced:
        settle(heir, taken)
        assert heir.lost == []
        assert heir.position().accepted == 1


def test_an_acceptance_that_comes_late_is_in_the_trail(drainers, sql, outbox):
    """Per has counted it: the request is shown, once, and who reconciles knows that it may have counted."""
    late, heir, _ = drainers
    (number,) = append(late, 1)
    claimed = late.claim(0, 1)
    kill(sql, late)
    heir._sweep_at = float("-inf")
    settle(heir, heir.claim(0, 1))
    settle(late, [claimed[0]], transaction_id="LATE")
    settle(heir, claimed)  # whose first try was answered, and nobody heard the answer
    with open_trail(DatabaseURL(outbox)) as trail:
        one, tries = trail.trace_one(number)
    assert one.transaction_id == "T"
    assert [each.reason is None for each in tries] == [False, True]
    assert tries[0].reason.endswith(" LATE")
    assert may_have_counted(tries[0].reason)


def test_a_drainer_knows_that_its_lease_is_over(drainers, monkeypatch):
    """Without a heartbeat in time it claims nothing more, and extends nothing, whatever others do."""
    from perqueue._outbox.postgres import leases

    drainer, _, _ = drainers
    append(drainer, 1)
    now = leases.boot_time()
    monkeypatch.setattr(leases, "boot_time", lambda: now + leases.LEASE)
    assert not drainer.holds_lease()
    assert drainer.claim(0, 1) == []
    drainer.keep_lease()
    assert not drainer.holds_lease()


def test_a_deferral_and_an_answer_in_one_batch_are_one_move(drainers):
    """One that failed and was accepted before either was written down is accepted, after two requests."""
    drainer, _, _ = drainers
    (number,) = append(drainer, 1)
    (activity,) = drainer.claim(0, 1)
    both = [
        Settlement(activity=activity, event=Event.DEFER, answered_at=2_000, reason="HTTP 500"),
        Settlement(activity=activity, event=Event.ACCEPT, answered_at=3_000, transaction_id="T"),
    ]
    drainer.settle(both, drained_through=0, refusals=(0, None))
    assert drainer.settled([number])[number].state is State.ACCEPTED
    assert drainer._rows("SELECT tries FROM perqueue_settled") == [(2,)]
    assert drainer._rows("SELECT count(*) FROM perqueue_pending") == [(0,)]
    assert drainer.lost == []


def test_counters_survive_drainers(drainers, outbox):
    """What a drainer has counted is counted after its end, and after its death, once."""
    first, second, third = drainers
    append(first, 6)
    settle(first, first.claim(0, 3))
    settle(second, second.claim(0, 3))
    first.end_term()
    assert third.position().accepted == 6
    third._rows("UPDATE perqueue_drainer SET alive_until = 'epoch' WHERE owner = %s", (second._owner,))
    third.begin_term()
    assert third._rows("SELECT count(*) FROM perqueue_drainer WHERE accepted > 0") == [(0,)]
    assert third.position().accepted == 6


def test_refusals_have_numbers_in_the_order_of_commits(drainers):
    """Refusals of several drainers are numbered without gap or repeat: a flush misses none of them."""
    first, second, _ = drainers
    append(first, 8)
    one, two = first.claim(0, 4), second.claim(0, 4)
    settle(second, two[:2], Event.REJECT)
    settle(first, one, Event.REJECT)
    settle(second, two[2:], Event.REJECT)
    assert ids(first.rejected_since(0, 10)) == ids([*two[:2], *one, *two[2:]])
    assert first.position().rejections == 8
    assert ids(second.rejected_since(6, 10)) == ids(two[2:])


def test_what_is_committed_late_is_not_missed(drainers, database, outbox):
    """An activity whose transaction is long is claimed after later ones, and not forgotten."""
    import psycopg

    from perqueue._outbox.postgres.outbox import _APPEND

    drainer, _, _ = drainers
    with closing(psycopg.connect(outbox)) as business:
        (late,) = business.execute(_APPEND, ("GROUP", "LATE", "TYPE", 1_000)).fetchone()
        early = append(drainer, 3)
        assert late < early[0]
        assert ids(drainer.claim(0, 10)) == early
        business.commit()
        drainer._sweep_at = float("-inf")
        assert ids(drainer.claim(early[-1], 10)) == [late]


def test_one_probe_at_a_time_for_all_drainers(drainers):
    """While nothing gets through, one drainer of all may ask; the next one when its answer was bad."""
    from perqueue._outbox.protocol import Hold

    first, second, third = drainers
    hold = Hold(kind="backing_off", reason="HTTP 500", until=0, wait_ms=0)
    assert first.set_hold(hold).number == 1
    allowed = [each.take_probe() for each in drainers]
    assert allowed == [True, False, False]
    assert first.set_hold(hold).number == 2
    second._probe_at = third._probe_at = float("-inf")
    assert [second.take_probe(), third.take_probe()] == [True, False]


def test_a_probe_ends_with_its_term(drainers):
    """A drainer that probed with a bad token, which is its own trouble, leaves the next probe to another."""
    from perqueue._outbox.protocol import Hold

    bad, well, _ = drainers
    hold = Hold(kind="backing_off", reason="HTTP 500", until=0, wait_ms=0)
    assert bad.set_hold(hold).number == 1
    assert bad.take_probe()
    assert bad.set_hold(hold._replace(kind="bad_token")).number == 0
    assert not well.take_probe()
    bad.end_term()
    well._probe_at = float("-inf")
    assert well.take_probe()


def test_trouble_of_one_drainer_is_not_everybodys(drainers):
    """As long as Per answers another drainer, one that gets no answers holds up nobody else."""
    from perqueue._outbox.protocol import Hold

    cut_off, well, _ = drainers
    append(well, 1)
    settle(well, well.claim(0, 1))
    assert cut_off.set_hold(Hold(kind="backing_off", reason="R", until=0, wait_ms=9_000)).number == 0
    assert cut_off.set_hold(Hold(kind="bad_token", reason="R", until=0, wait_ms=9_000)).number == 0
    assert well.news().hold is None
    assert cut_off.set_hold(Hold(kind="retry_after", reason="R", until=0, wait_ms=9_000)).number == 1
    assert well.news().hold.kind == "retry_after"


def test_drainers_tell_each_other_what_per_takes(drainers):
    """With its heartbeat each learns the mean of the rates at which those send that Per has slowed down."""
    first, second, third = drainers
    for drainer, rate in ((first, 30.0), (second, 10.0), (third, None)):
        drainer.stay_awake()
        drainer.set_drainer(1, Load(1, 1, rate))
    assert first.keep_lease() is None  # no other has said what it sends
    assert second.keep_lease() is None
    assert (third.keep_lease(), first.keep_lease()) == (20.0, 20.0)
    second.set_drainer(1, Load(1, 1, 20.0))
    second.keep_lease()
    assert first.keep_lease() == 25.0
    load = first.position().load
    assert (load.in_flight, load.limit, load.rate) == (3, 3, 50.0)
