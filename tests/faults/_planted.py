"""Defects to plant, one promise broken by each, so that the model is known to see them."""

from dataclasses import replace

from perqueue._activity import Event, Outcome, State, Verdict
from perqueue._delivery.drain import Drain
from perqueue._delivery.feed import Feed
from perqueue._delivery.pace import Pace
from perqueue._delivery.settler import Settler
from perqueue._delivery.worker import Worker
from perqueue._flush import Flush
from perqueue._outbox import OperatorOutbox, SQLiteOutbox


def record_returns_before_the_commit(patch):
    """What is recorded is kept in memory until the drain asks for it."""
    append, claim, position = SQLiteOutbox.append, SQLiteOutbox.claim, SQLiteOutbox.position

    def late(outbox):
        for values in outbox.__dict__.pop("_late", []):
            append(outbox, *values)

    def append_later(outbox, *values):
        late_ones = outbox.__dict__.setdefault("_late", [])
        late_ones.append(values)
        return position(outbox).last_id + len(late_ones)

    def claim_late(outbox, *values):
        late(outbox)
        return claim(outbox, *values)

    patch.setattr(SQLiteOutbox, "append", append_later)
    patch.setattr(SQLiteOutbox, "claim", claim_late)


def watermark_jumps_over_what_is_outstanding(patch):
    """Everything claimed counts as done, so that a crash forgets it."""
    patch.setattr(Feed, "watermark", lambda feed, _: feed._cursor)


def an_error_page_is_taken_for_an_answer(patch):
    """An activity leaves pending without Per's own answer."""
    answered = Drain._answered

    def lie(drain, activity, outcome, sent_at):
        if outcome.status == 200 and outcome.verdict is Verdict.NO_ANSWER:
            outcome = Outcome(verdict=Verdict.ACCEPTED, transaction_id="T0")
        answered(drain, activity, outcome, sent_at)

    patch.setattr(Drain, "_answered", lie)


def reason_is_forgotten(patch):
    """A refusal is stored without Per's reason."""
    settle = SQLiteOutbox.settle

    def forget(outbox, settlements, **more):
        some = [s._replace(reason="") if s.event is Event.REJECT else s for s in settlements]
        return settle(outbox, some, **more)

    patch.setattr(SQLiteOutbox, "settle", forget)


def pruning_takes_the_rejected(patch):
    """What an operator has not decided about is deleted."""
    prune = SQLiteOutbox.prune

    def greedy(outbox, *values):
        more = prune(outbox, *values)
        with outbox._writing() as connection:
            first = "(SELECT min(activity_id) FROM perqueue_settlement WHERE rejection IS NOT NULL)"
            connection.execute(f"DELETE FROM perqueue_activity WHERE id = {first}")
            connection.execute(f"DELETE FROM perqueue_settlement WHERE activity_id = {first}")
        return more

    patch.setattr(SQLiteOutbox, "prune", greedy)


def pruning_takes_the_highest_id(patch):
    """An ID is given twice."""
    prune = SQLiteOutbox.prune

    def greedy(outbox, *values):
        more = prune(outbox, *values)
        with outbox._writing() as connection:
            connection.execute(
                "DELETE FROM perqueue_activity WHERE id = (SELECT max(activity_id) FROM perqueue_settlement"
                f" WHERE state = {int(State.ACCEPTED)})"
            )
        return more

    patch.setattr(SQLiteOutbox, "prune", greedy)


def flush_returns_early(patch):
    """flush() returns although something is pending."""
    done = Flush.done
    patch.setattr(Flush, "done", lambda flush: done(flush) or True)


def outcome_that_cannot_be_written_is_dropped(patch):
    """What Per has accepted is sent again, because the disk refused to note it down."""
    settle = Settler.settle

    def drop(settler, **more):
        try:
            settle(settler, **more)
        except Exception:
            for settlement in settler._outcomes:
                settler._feed.put_back(settlement.activity)
            settler._outcomes.clear()
            raise

    patch.setattr(Settler, "settle", drop)


def trouble_does_not_stop_the_drain(patch):
    """Requests go on although their outcomes cannot be stored."""
    turn, choose = Drain._turn, Drain._next

    def careless_turn(drain):
        turn(drain)
        if drain.trouble is not None:
            drain._open_lanes()

    def careless_choice(drain):
        trouble, drain.trouble = drain.trouble, None
        activity = choose(drain)
        drain.trouble = trouble
        return activity

    patch.setattr(Drain, "_turn", careless_turn)
    patch.setattr(Drain, "_next", careless_choice)


def retry_after_is_ignored(patch):
    """Per asks to wait, and is not heard."""
    patch.setattr(Pace, "throttled", lambda pace, sent_at, reason, _: pace.failed(sent_at, reason))


def retry_after_is_forgotten_by_a_restart(patch):
    """A wait that Per asked for ends with the process that heard of it."""
    begin = Settler.begin
    patch.setattr(
        Settler, "begin", lambda settler, position, cap: begin(settler, position._replace(hold=None), cap)
    )


def everybody_is_elected(patch):
    """Two processes deliver at once."""

    def elected(worker, _):
        worker.standby = False
        return True

    patch.setattr(Worker, "_elected", elected)


def own_waits_never_end(patch):
    """What failed on its own account is forgotten."""
    patch.setattr(Feed, "_claim_due", lambda feed, want: 0)


def bad_token_costs_the_activity(patch):
    """What met a bad token is given up."""
    answered = Drain._answered

    def give_up(drain, activity, outcome, sent_at):
        if outcome.verdict is Verdict.BAD_TOKEN:
            outcome = outcome._replace(verdict=Verdict.REJECTED)
        answered(drain, activity, outcome, sent_at)

    patch.setattr(Drain, "_answered", give_up)


def requeue_leaves_no_trace(patch):
    """A requeued activity is pending, and nobody will ever look for it."""
    requeue = OperatorOutbox.requeue

    def forgetful(outbox, *values):
        count = requeue(outbox, *values)
        with outbox._writing() as connection:
            connection.execute("DELETE FROM perqueue_retry WHERE not_before = 0")
        return count

    patch.setattr(OperatorOutbox, "requeue", forgetful)


def counters_count_twice(patch):
    """stats() tells of more than there is."""
    settle = SQLiteOutbox.settle

    def twice(outbox, settlements, **more):
        result = settle(outbox, settlements, **more)
        if len(settlements) > 3:
            with outbox._writing() as connection:
                connection.execute("UPDATE perqueue_drain SET accepted = accepted + 1")
        return result

    patch.setattr(SQLiteOutbox, "settle", twice)


def ids_are_altered_on_the_way(patch):
    """Per is sent something else than was recorded."""
    claim = SQLiteOutbox.claim

    def normalised(outbox, *values):
        return [replace(a, billing_id=a.billing_id.strip() or "?") for a in claim(outbox, *values)]

    patch.setattr(SQLiteOutbox, "claim", normalised)


DEFECTS = [
    record_returns_before_the_commit,
    watermark_jumps_over_what_is_outstanding,
    an_error_page_is_taken_for_an_answer,
    bad_token_costs_the_activity,
    counters_count_twice,
    everybody_is_elected,
    flush_returns_early,
    ids_are_altered_on_the_way,
    outcome_that_cannot_be_written_is_dropped,
    own_waits_never_end,
    pruning_takes_the_highest_id,
    pruning_takes_the_rejected,
    reason_is_forgotten,
    requeue_leaves_no_trace,
    retry_after_is_forgotten_by_a_restart,
    retry_after_is_ignored,
    trouble_does_not_stop_the_drain,
]
