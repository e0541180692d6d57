"""Per's report and the outbox are brought together, and what does not fit is not talked away."""

import asyncio
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from perqueue import ConfigurationError, PerAPIError, PerClient, PerQueueError
from perqueue._activity import Event, Settlement
from perqueue._answers import may_have_counted
from perqueue._clock import Clock
from perqueue._outbox import OperatorOutbox
from perqueue._reconcile import reconcile
from perqueue._report import Report
from perqueue.sandbox import Hang, Refuse, ResetAfterAccepting

ORIGIN = "https://api.useper.com"
START = datetime(2026, 3, 1, tzinfo=UTC)
END = datetime(2026, 3, 31, 23, 59, 59, 999000, tzinfo=UTC)
HOUR = timedelta(hours=1)
COUNTS = ("per_unique", "delivered_unique", "recorded_unique", "late", "uncertain", "pending", "rejected")


def ms(moment):
    return round(moment.timestamp() * 1000)


class Book:
    """An outbox of last March, and what Per says of that month."""

    def __init__(self, outbox):
        self.path, self.outbox = outbox.path, outbox
        self.said = {}

    def record(self, user, at, *, billing_id="GROUP"):
        """Record an activity at a moment, and return it."""
        activity_id = self.outbox.append(billing_id, user, "TYPE", ms(at))
        return self.outbox.claim(activity_id - 1, 1)[0]

    def accept(self, activity, at, took=timedelta(milliseconds=50)):
        """Have Per's acceptance arrive at a moment."""
        self._settle(activity, Event.ACCEPT, at, took, transaction_id=f"T{activity.id}")

    def refuse(self, activity, at):
        self._settle(activity, Event.REJECT, at, timedelta(0), reason="no")

    def fail(self, activity, at, reason, took=timedelta(seconds=10)):
        self._settle(activity, Event.DEFER, at, took, reason=reason)

    def _settle(self, activity, event, at, took, **more):
        duration = took // timedelta(milliseconds=1)
        settlement = Settlement(
            activity=activity, event=event, answered_at=ms(at), duration_ms=duration, **more
        )
        self.outbox.settle([settlement], drained_through=0, refusals=(0, None))

    def says(self, **unique):
        """Have Per report so many unique users of these billing IDs."""
        self.said = {billing_id: {"unique": count} for billing_id, count in unique.items()}

    def compare(self, start=START, end=END, now=END + HOUR, tolerance=timedelta(0)):
        types = {"TYPE": {"billingIds": self.said}} if self.said else {}
        raw = {"start": START.isoformat(), "end": END.isoformat(), "activityTypes": types}
        clock = Clock(wall=now.timestamp)
        return reconcile(self.path, lambda *_: Report(raw), start, end, clock, tolerance)

    def row(self):
        """Return the only row: its numbers in the order of their columns, verdict and note."""
        [row] = self.compare()
        return tuple(getattr(row, name) for name in COUNTS), row.verdict, row.note


@pytest.fixture
def book(tmp_path):
    with closing(OperatorOutbox(tmp_path / "outbox.db", ORIGIN)) as outbox:
        yield Book(outbox)


def test_what_agrees_matches(book):
    """Users are counted once, however often they were active; equal numbers are a match without a note."""
    for user in ("USER_1", "USER_1", "USER_2"):
        book.accept(book.record(user, START + HOUR), START + 2 * HOUR)
    book.says(GROUP=2)
    assert book.row() == ((2, 2, 2, 0, 0, 0, 0), "match", "")
    found = book.compare()
    assert (found.start, found.end, found.complete, found.damaged) == (START, END, True, 0)
    assert (len(found), found[0], found[:], found.unexplained) == (1, *found.rows(), tuple(found), [])


def test_late_at_the_end_is_explained(book):
    """Recorded in the period and sent after it: late, and the difference is explained."""
    book.accept(book.record("USER_1", END - HOUR), END + HOUR)
    book.accept(book.record("USER_2", END - HOUR), END - HOUR / 2)
    book.says(GROUP=1)
    numbers, verdict, note = book.row()
    assert (numbers, verdict) == ((1, 1, 2, 1, 0, 0, 0), "explained")
    assert "1 late" in note


def test_late_at_the_start_is_explained(book):
    """Recorded before the period and sent in it: late, and delivered without being recorded."""
    book.accept(book.record("USER_1", START - HOUR), START + HOUR)
    book.says(GROUP=1)
    assert book.row()[:2] == ((1, 1, 0, 1, 0, 0, 0), "explained")


def test_what_passed_the_whole_period_by_is_no_part_of_it(book):
    """Recorded before the period and sent after it: no row."""
    book.accept(book.record("USER_1", START - HOUR), END + HOUR)
    book.accept(book.record("USER_2", START - 3 * HOUR), START - 2 * HOUR)
    assert book.compare().rows() == []


@pytest.mark.parametrize(("boundary", "delivered"), [(START, 1), (END, 0)])
@pytest.mark.parametrize("counted", [0, 1])
def test_what_straddles_a_boundary_is_uncertain(book, boundary, delivered, counted):
    """Sent before a boundary and answered after it, an activity may have arrived on either side: both fit."""
    second = timedelta(seconds=1)
    book.accept(book.record("USER_1", boundary - HOUR), boundary + second, took=2 * second)
    book.says(GROUP=counted)
    recorded = 1 - delivered
    numbers, verdict, note = book.row()
    assert numbers == (counted, delivered, recorded, 0, 1, 0, 0)
    assert verdict == "explained"
    assert "1 uncertain" in note


def test_a_straddling_user_who_was_there_anyway_is_no_excuse(book):
    """Sets, not sums: a user delivered in the period cannot explain another one by a straddling repeat."""
    book.accept(book.record("USER_1", START), START + HOUR)
    book.accept(book.record("USER_1", END - HOUR), END + HOUR, took=2 * HOUR)
    book.says(GROUP=2)
    assert book.row()[:2] == ((2, 1, 1, 0, 1, 0, 0), "unexplained")


def test_pending_and_rejected_are_counted(book):
    """What is not delivered is told apart, by what it is now; a discarded one was rejected."""
    book.record("USER_1", START)
    book.refuse(book.record("USER_2", START), START + HOUR)
    book.refuse(book.record("USER_3", START), START + HOUR)
    book.outbox.discard([3])
    book.accept(book.record("USER_4", START), START + HOUR)
    book.record("USER_5", START - HOUR)  # of another period
    book.says(GROUP=1)
    numbers, verdict, note = book.row()
    assert (numbers, verdict) == ((1, 1, 4, 0, 0, 1, 2), "explained")
    assert note == "1 pending; 2 rejected"


@pytest.mark.parametrize(("per", "word"), [(3, "1 more"), (1, "1 fewer")])
def test_what_the_outbox_does_not_know_is_unexplained(book, per, word):
    """More or fewer than was delivered is unexplained, whatever else is late or pending."""
    for user in ("USER_1", "USER_2"):
        book.accept(book.record(user, START), START + HOUR)
    book.accept(book.record("LATE", END - HOUR), END + HOUR)
    book.record("PENDING", END - HOUR)
    book.says(GROUP=per)
    numbers, verdict, note = book.row()
    assert numbers == (per, 2, 4, 1, 0, 1, 0)
    assert verdict == "unexplained"
    assert word in note


def test_a_process_that_was_killed_is_not_taken_for_a_stranger(book):
    """What was under way when it was killed has left no trace, and is sent again: nobody is accused."""
    book.accept(book.record("USER_1", START), START + HOUR)
    book.says(GROUP=2)
    assert book.row()[2].endswith("something else feeds the same account")
    book.accept(book.record("UNDER_WAY", END - HOUR), END + HOUR)
    assert book.row()[2].endswith(" the same account, or a process was killed while it sent")


@pytest.mark.parametrize(
    ("reason", "verdict"),
    [("no answer within 10 s", "explained"), ("ConnectError: refused", "unexplained")],
)
def test_a_request_without_an_answer_may_have_counted(book, reason, verdict):
    """A request that was sent in the period and not answered explains one user; one never sent does not."""
    activity = book.record("USER_1", END - HOUR)
    book.fail(activity, END - HOUR / 2, reason)
    book.accept(activity, END + HOUR)
    book.says(GROUP=1)
    assert book.row()[:2] == ((1, 0, 1, 1, 0, 0, 0), verdict)


@pytest.mark.parametrize(
    ("reason", "may"),
    [
        ("no answer within 10 s", True), ("ReadError: reset", True), ("ConnectionResetError: gone", True),
        ("not an answer of Per's: gzip", True), ("HTTP 200, not an answer of Per's", True),
        ("HTTP 504", True), ("HTTP 524", True), ("HTTP 503", False), ("HTTP 429", False),
        ("perqueue failed: TypeError", True), ("ConnectError", False),
        ("ConnectError: no such host", False), ("rate_limited", False), ("unknown_user", False),
    ],
)  # fmt: skip
def test_which_failures_may_have_counted(reason, may):
    """Only what was sent, and what Per did not say no to, may be in its report."""
    assert may_have_counted(reason) is may


@pytest.mark.parametrize(("per", "verdict"), [(2, "explained"), (3, "unexplained")])
def test_a_trail_with_a_gap_is_no_match(book, per, verdict):
    """Once activities of the period were pruned nothing is a match: equal numbers say little."""
    for user in ("USER_1", "USER_2", "USER_3"):
        book.accept(book.record(user, START), START + HOUR)
    book.outbox.prune(ms(START + 2 * HOUR), 100, 1)
    book.says(GROUP=per)
    [row] = found = book.compare()
    assert (found.complete, row.delivered_unique) == (False, 2)
    assert (row.verdict, row.note.endswith("trail incomplete")) == (verdict, True)
    assert "something else" not in row.note  # it may as well be what is gone
    book.says(GROUP=0)
    assert book.compare(START + 2 * HOUR).complete


def test_pruned_activities_of_another_period_do_not_matter(book):
    """What was settled before the period and pruned since leaves the trail of the period complete."""
    book.accept(book.record("OLD", START - 2 * HOUR), START - HOUR)
    book.accept(book.record("USER_1", START), START + HOUR)
    book.outbox.prune(ms(START), 100, 10)
    book.says(GROUP=1)
    assert book.row()[1] == "match"


def test_damaged_rows_are_not_counted_and_told(book):
    """A row that is not what was recorded is nobody's: it is told beside the rows, and nothing is a match."""
    for user in ("USER_1", "USER_2"):
        book.accept(book.record(user, START), START + HOUR)
    with book.outbox._writing() as connection:
        connection.execute("UPDATE perqueue_activity SET user_id = 'OTHER' WHERE id = 1")
    book.says(GROUP=1)
    [row] = found = book.compare()
    assert (found.damaged, found.complete) == (1, False)
    assert (row.delivered_unique, row.verdict) == (1, "explained")


def test_each_type_and_billing_id_has_its_row(book):
    """Rows are those of Per and those of the outbox, in order; neither hides the other's."""
    book.accept(book.record("USER_1", START, billing_id="B"), START + HOUR)
    book.says(A=1, B=1)
    assert [(row.billing_id, row.verdict) for row in book.compare()] == [("A", "unexplained"), ("B", "match")]


def test_a_report_of_a_period_that_is_not_over(book):
    """What is answered while the report is made may be in it; what comes later is not expected there."""
    now = START + 10 * HOUR
    book.accept(book.record("USER_1", START), now + HOUR, took=2 * HOUR)
    book.accept(book.record("USER_2", START), now + 2 * HOUR, took=HOUR)
    for per, verdict in ((0, "explained"), (1, "explained"), (2, "unexplained")):
        book.says(GROUP=per)
        for end in (END, None):
            [row] = book.compare(end=end, now=now)
            # Nothing is late yet: the end of the period is to come.
            assert (row.verdict, row.uncertain, row.pending, row.late) == (verdict, 1, 1, 0)
    assert "not over" in row.note


def test_without_dates_the_period_is_pers(book):
    """Without dates the period is the one that Per reports; a report that names none is an error."""
    book.accept(book.record("USER_1", START), START + HOUR)
    book.says(GROUP=1)
    found = book.compare(None, None)
    assert (found.start, found.end, found[0].verdict) == (START, END, "match")
    with pytest.raises(PerAPIError, match="which period"):
        reconcile(book.path, lambda *_: Report({}), None, None, Clock())


# -- against a Per


class Tick:
    """A clock for the sandbox that can be set ahead."""

    def __init__(self):
        self.ahead = timedelta(0)

    def __call__(self):
        return datetime.now(UTC) + self.ahead


def now():
    """Return a moment after all that has happened, and before all that will, in milliseconds too."""
    time.sleep(0.003)
    moment = datetime.now(UTC)
    time.sleep(0.003)
    return moment


def test_a_deliberately_late_activity_is_found_and_explained(per, make_queue):
    """Recorded during an outage and delivered after the boundary: late on both sides of it, and explained."""
    queue = make_queue()
    start = now()
    queue.record("GROUP_A", "USER_1")
    queue.flush()
    per.go_down()
    queue.record("GROUP_A", "USER_2")
    boundary = now()
    per.come_back()
    queue.flush()
    [before] = queue.reconcile(start, boundary)
    [after] = queue.reconcile(boundary.isoformat(), now())
    assert [getattr(before, name) for name in COUNTS] == [1, 1, 2, 1, 0, 0, 0]
    assert [getattr(after, name) for name in COUNTS] == [1, 1, 0, 1, 0, 0, 0]
    assert before.verdict == after.verdict == "explained"
    [late] = queue.history(user_id="USER_2")
    assert late.recorded_at < boundary < late.settled_at
    [match] = queue.reconcile(start, now())
    assert (match.verdict, match.note) == ("match", "")


def test_an_activity_behind_perqueues_back_is_unexplained(make_queue, options):
    """What another program told Per is unexplained; the rest of the bill is traced to single activities."""
    queue = make_queue()
    start = now()
    for user in ("USER_1", "USER_2", "USER_1"):
        queue.record("GROUP_A", user)
    queue.flush()
    with PerClient(**options) as client:
        client.add_activity("GROUP_A", "STRANGER")
    [row] = queue.reconcile(start, now())
    assert (row.per_unique, row.delivered_unique, row.verdict) == (3, 2, "unexplained")
    known = queue.history(billing_id="GROUP_A", since=start)
    assert {record.user_id for record in known if record.transaction_id} == {"USER_1", "USER_2"}


@pytest.mark.parametrize("ahead", [timedelta(0), timedelta(minutes=1)])
def test_an_activity_on_its_way_at_the_boundary_is_uncertain(make_queue, per, until, ahead):
    """Sent before the boundary and answered after it, wherever it was counted, it explains the difference."""
    clock = Tick()
    per._per.clock = clock
    queue = make_queue()
    start = now()
    per.set_fault(Hang(accept=True))
    clock.ahead = ahead  # as if it took so long to arrive
    queue.record("GROUP_A", "USER_1")
    until(lambda: per.requests == 1)
    boundary = now()
    per.clear_faults()
    per.release()
    queue.flush()
    [row] = queue.reconcile(start, boundary)
    assert (row.per_unique, row.delivered_unique) == (0 if ahead else 1, 0)
    assert (row.uncertain, row.verdict) == (1, "explained")


def test_a_lost_answer_that_counted_in_both_periods_is_explained(make_queue, per, until):
    """Counted before the boundary without an answer, and again after it: both numbers are explained."""
    queue = make_queue()
    start = now()
    per.set_fault(ResetAfterAccepting())
    queue.record("GROUP_A", "USER_1")
    until(lambda: [record.attempts for record in queue.history()] != [0])
    per.go_down()
    boundary = now()
    per.clear_faults()
    per.come_back()
    queue.flush()
    [before] = queue.reconcile(start, boundary)
    [after] = queue.reconcile(boundary, now())
    assert (before.per_unique, before.delivered_unique, before.verdict) == (1, 0, "explained")
    assert (after.per_unique, after.delivered_unique, after.verdict) == (1, 1, "explained")
    assert "may have counted" in before.note


def test_pending_and_rejected_against_a_per(make_queue, per, until):
    """What Per refused, and what it never heard of, is counted beside what it has."""
    queue = make_queue()
    start = now()
    queue.record("GROUP_A", "USER_1")
    queue.flush()
    per.set_fault(Refuse("no"), times=1)
    queue.record("GROUP_A", "USER_2")
    until(lambda: queue.stats().rejected == 1)
    end = now()
    per.go_down()
    queue.record("GROUP_A", "USER_3")
    per_was_down = now()
    per.come_back()
    per.set_fault(Hang())
    [row] = queue.reconcile(start, per_was_down)
    assert [getattr(row, name) for name in COUNTS] == [1, 1, 3, 0, 0, 1, 1]
    assert row.verdict == "explained"
    [earlier] = queue.reconcile(start, end)
    assert (earlier.recorded_unique, earlier.pending) == (2, 0)


def test_reconcile_raises_what_a_report_raises(make_queue, per):
    """Without a report there is no reconciliation: the error is that of `get_report()`."""
    queue = make_queue(drain=False)
    with pytest.raises(ConfigurationError):
        queue.reconcile(end=END)
    per.go_down()
    with pytest.raises(PerQueueError):
        queue.reconcile(START, END)


def test_equal_numbers_of_other_users_are_no_match(book):
    """One late into the period and one late out of it make equal numbers: explained, and no match."""
    book.accept(book.record("USER_1", START - HOUR), START + HOUR)
    book.accept(book.record("USER_2", END - HOUR), END + HOUR)
    book.says(GROUP=1)
    assert book.row()[:2] == ((1, 1, 1, 2, 0, 0, 0), "explained")


def test_a_trail_that_lost_nothing_reaches_back_for_ever(book):
    """Asked from the epoch, or from before it, an outbox that pruned nothing is complete."""
    book.accept(book.record("USER_1", START), START + HOUR)
    book.says(GROUP=1)
    for first in (datetime(1970, 1, 1, tzinfo=UTC), datetime(1, 1, 1, tzinfo=UTC)):
        found = book.compare(start=first)
        assert (found.complete, found[0].verdict) == (True, "match")


@pytest.mark.parametrize(("tolerance", "verdict"), [(0, "unexplained"), (1, "explained")])
def test_clocks_that_differ_are_tolerated_if_told_so(book, tolerance, verdict):
    """What was sent half a second before a boundary may count after it, if clocks differ by a second."""
    book.accept(book.record("USER_1", END - HOUR), END - timedelta(seconds=0.5))
    book.says(GROUP=0)
    [row] = book.compare(tolerance=timedelta(seconds=tolerance))
    assert (row.verdict, row.delivered_unique, row.uncertain) == (verdict, 1, 0)
    assert ("clocks decide" in row.note) is (verdict == "explained")
    with pytest.raises(ConfigurationError):
        book.compare(tolerance=1)


def test_a_running_delivery_raises_no_alarm(make_queue, per, until):
    """Asked in the middle of delivering, what Per has already and the outbox not yet is no difference."""
    queue = make_queue()
    start = now()
    for n in range(300):
        queue.record("GROUP_A", f"USER_{n}")
    verdicts = set()
    while queue.stats().pending:
        verdicts |= {row.verdict for row in queue.reconcile(start)}
    assert "unexplained" not in verdicts
    [row] = asyncio.run(queue.areconcile(start))
    assert (row.verdict, row.per_unique) == ("match", 300)


def test_a_request_that_close_gave_up_may_have_counted(make_queue, per, until):
    """A request under way when the queue was closed is an attempt, and explains what Per counted."""
    per.set_fault(Hang(accept=True))
    queue = make_queue(exit_timeout=0.1)
    start = now()
    queue.record("GROUP_A", "USER_1")
    until(lambda: per.accepted == 1)
    queue.close()
    boundary = now()
    per.clear_faults()
    per.release()
    queue = make_queue()
    queue.flush()
    [row] = queue.reconcile(start, boundary)
    assert (row.per_unique, row.delivered_unique, row.late, row.verdict) == (1, 0, 1, "explained")
    assert [attempt.reason for attempt in queue.attempts(1)] == ["no answer before the end", None]
