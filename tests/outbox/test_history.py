"""Whatever happens to activities, in whatever order, the outbox's counters and claims tell the truth."""

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from perqueue import Activity, OutboxFull
from perqueue._activity import Event, Settlement, State
from perqueue._outbox import OperatorOutbox, SQLiteOutbox
from perqueue._outbox.damage import settlement_checksum

ORIGIN = "https://api.useper.com"
NOW = 1_700_000_000_000


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outbox.db"


@pytest.fixture
def outbox(path):
    with closing(OperatorOutbox(path, ORIGIN)) as each:
        yield each


def settle(outbox, activity, event, through=0, *, at=NOW, not_before=None):
    transaction = f"T{activity.id}" if event is Event.ACCEPT else None
    settlement = Settlement(
        activity=activity,
        event=event,
        answered_at=at,
        transaction_id=transaction,
        reason=None if event is Event.ACCEPT else "a reason",
        not_before=not_before,
    )
    outbox.settle([settlement], drained_through=through, refusals=(0, None))


def damage(path, activity_id):
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute(
            "UPDATE perqueue_activity SET user_id = 'X' || substr(user_id, 2) WHERE id = ?", (activity_id,)
        )
        connection.commit()


class History(RuleBasedStateMachine):
    """An outbox beside a model of it that counts everything afresh."""

    template = None

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "outbox.db"
        if History.template is None:
            History.template = Path(tempfile.mkdtemp()) / "outbox.db"
            OperatorOutbox(History.template, ORIGIN).close()
        shutil.copy(History.template, self.path)
        self.outbox = OperatorOutbox(self.path, ORIGIN)
        self.states = {}  # of every activity that was ever recorded
        self.pruned = set()
        self.waiting = set()  # pending on their own account
        self.damaged_rows = set()
        self.refused = []  # in the order of Per's refusals
        self.last_id = self.cursor = 0
        self.outstanding = {}

    def teardown(self):
        self.outbox.close()
        shutil.rmtree(self.folder)

    @rule(count=st.integers(1, 5))
    def record(self, count):
        for _ in range(count):
            activity_id = self.outbox.append("GROUP", f"USER_{self.last_id + 1}", "TYPE", NOW)
            assert activity_id > self.last_id
            self.last_id = activity_id
            self.states[activity_id] = State.PENDING

    def _claimed(self, activities, expected):
        assert [activity.id for activity in activities] == expected
        for activity in activities:
            assert activity.user_id == f"USER_{activity.id}"
            self.outstanding[activity.id] = activity

    @rule(limit=st.integers(1, 4))
    def claim(self, limit):
        claimed = self.outbox.claim(self.cursor, limit)
        candidates = [
            i
            for i, state in self.states.items()
            if i > self.cursor and state is State.PENDING and i not in self.waiting
        ]
        looked_at = candidates[:limit]
        while looked_at and all(i in self.damaged_rows for i in looked_at):  # looks on, past damaged ones
            self._quarantined(looked_at)
            candidates = candidates[limit:]
            looked_at = candidates[:limit]
        self._quarantined(looked_at)
        self._claimed(claimed, [i for i in looked_at if i not in self.damaged_rows])
        if claimed:
            self.cursor = claimed[-1].id

    def _quarantined(self, ids):
        for i in self.damaged_rows.intersection(ids):
            self.states[i] = State.DAMAGED
            self.waiting.discard(i)

    @rule(limit=st.integers(1, 4))
    def claim_due(self, limit):
        claimed = self.outbox.claim_due(2**62, 2**62, limit, self.outstanding)
        ids = [activity.id for activity in claimed]
        assert set(ids) <= self.waiting - self.outstanding.keys() - self.damaged_rows
        candidates = self.waiting - self.outstanding.keys()
        gone = {i for i in self.damaged_rows & candidates if i in self.outbox.settled([i])}
        self._quarantined(gone)
        assert len(ids) + len(gone) == min(limit, len(candidates))
        self._claimed(claimed, ids)

    @precondition(lambda self: self.outstanding)
    @rule(
        data=st.data(), event=st.sampled_from([Event.ACCEPT, Event.ACCEPT, Event.REJECT, Event.DEFER, "own"])
    )
    def settle(self, data, event):
        activity_id = data.draw(st.sampled_from(sorted(self.outstanding)))
        activity = self.outstanding[activity_id]
        not_before = NOW if event == "own" else None
        event = Event.DEFER if event == "own" else event
        leaving = event is not Event.DEFER or not_before is not None
        staying = min(
            (i for i in self.outstanding if i != activity_id or not leaving), default=self.cursor + 1
        )
        settle(self.outbox, activity, event, min(self.cursor, staying - 1), not_before=not_before)
        if leaving:
            del self.outstanding[activity_id]
        if event is Event.DEFER:
            if not_before is not None:
                self.waiting.add(activity_id)
            return
        self.waiting.discard(activity_id)
        self.states[activity_id] = State.ACCEPTED if event is Event.ACCEPT else State.REJECTED
        if event is Event.REJECT:
            self.refused.append(activity_id)

    @precondition(lambda self: self.outstanding)
    @rule()
    def settle_twice(self):
        """A late outcome of one that is settled changes nothing."""
        settled = [i for i, state in self.states.items() if state is State.ACCEPTED and i not in self.pruned]
        for i in settled[:1]:
            activity = Activity(
                id=i, billing_id="GROUP", user_id="", activity_type_id="TYPE", recorded_at=NOW
            )
            settle(self.outbox, activity, Event.REJECT)

    @rule(data=st.data(), every=st.booleans())
    def requeue(self, data, every):
        chosen = None if every or not self.refused else [data.draw(st.sampled_from(self.refused))]
        moved = list(self.refused) if chosen is None else chosen
        assert self.outbox.requeue(chosen) == len(moved)
        for i in moved:
            self.states[i] = State.PENDING
            self.waiting.add(i)
            self.refused.remove(i)

    @precondition(lambda self: self.refused)
    @rule(data=st.data())
    def discard(self, data):
        i = data.draw(st.sampled_from(self.refused))
        assert self.outbox.discard([i]) == 1
        assert self.outbox.discard([i]) == 0
        self.refused.remove(i)
        self.states[i] = State.DISCARDED

    @rule(limit=st.integers(1, 10))
    def prune(self, limit):
        self.outbox.prune(NOW + 1, 100, limit)
        with closing(sqlite3.connect(self.path)) as reader:
            left = {i for (i,) in reader.execute("SELECT id FROM perqueue_activity")}
        gone = self.states.keys() - left
        assert all(self.states[i] in (State.ACCEPTED, State.DISCARDED) for i in gone)
        assert self.last_id in left or not self.last_id
        self.pruned = gone

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def spoil(self, data):
        """A bit of a pending row that was not claimed yet goes wrong."""
        pending = [i for i, s in self.states.items() if s is State.PENDING and i not in self.outstanding]
        if pending:
            i = data.draw(st.sampled_from(pending))
            if i not in self.damaged_rows:
                damage(self.path, i)
                self.damaged_rows.add(i)

    @rule()
    def reopen(self):
        self.outbox.close()
        self.outbox = OperatorOutbox(self.path, ORIGIN)
        self.cursor = self.outbox.position().drained_through
        self.outstanding = {}

    @invariant()
    def counters_agree_with_a_full_count(self):
        position = self.outbox.position()
        of = {state: [i for i, s in self.states.items() if s is state] for state in State}
        assert position.last_id == self.last_id
        assert position.pending == len(of[State.PENDING])
        assert position.accepted == len(of[State.ACCEPTED])
        assert position.rejected == len(of[State.REJECTED])
        assert position.discarded == len(of[State.DISCARDED])
        assert position.damaged == len(of[State.DAMAGED])
        assert position.missing == 0
        oldest = min(of[State.PENDING], default=None)
        assert position.oldest_pending == (None if oldest is None else (oldest, NOW))
        through = self.last_id // 2
        assert self.outbox.count_pending(through, 1000) == sum(i <= through for i in of[State.PENDING])
        with closing(sqlite3.connect(self.path)) as reader:
            rows = dict(
                reader.execute(
                    "SELECT a.id, coalesce(s.state, 0) FROM perqueue_activity a"
                    " LEFT JOIN perqueue_settlement s ON s.activity_id = a.id"
                )
            )
            retry = {i for (i,) in reader.execute("SELECT activity_id FROM perqueue_retry")}
        assert rows == {i: state for i, state in self.states.items() if i not in self.pruned}
        assert retry == self.waiting
        assert all(i in self.waiting for i in of[State.PENDING] if i <= position.drained_through)

    @invariant()
    def outcomes_are_found(self):
        found = self.outbox.settled(list(self.states))
        assert {i: outcome.state for i, outcome in found.items()} == {
            i: s for i, s in self.states.items() if s is not State.PENDING and i not in self.pruned
        }
        intact = [i for i in self.refused if i not in self.damaged_rows]
        assert [activity.id for activity in self.outbox.rejected_since(0, 1000)] == intact


History.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class TestHistory(History.TestCase):
    """Over any history, pending is what a full count says, and nothing settled is claimed (invariant 2)."""


def test_ids_are_never_used_again(outbox, path):
    """IDs grow, also after everything was delivered and pruned, and over a restart (invariant 5)."""
    for n in range(30):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity in outbox.claim(0, 100):
        settle(outbox, activity, Event.ACCEPT, activity.id)
    while outbox.prune(NOW + 1, 10, 7):
        pass
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("SELECT id FROM perqueue_activity").fetchall() == [(30,)]
        assert reader.execute("SELECT activity_id FROM perqueue_settlement").fetchall() == [(30,)]
    outbox.close()
    with closing(SQLiteOutbox(path, ORIGIN)) as again:
        assert again.append("GROUP", "USER", "TYPE", NOW) == 31
        assert again.position().pending == 1
        assert again.position().accepted == 30


def test_pruning_takes_small_steps_and_spares_the_rejected(outbox, path):
    """Pruning looks at a few rows at a time, and never deletes what is rejected or pending (invariant 3)."""
    for n in range(100):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity in outbox.claim(0, 90):
        settle(outbox, activity, Event.REJECT if activity.id % 3 == 0 else Event.ACCEPT, activity.id)

    def left():
        with closing(sqlite3.connect(path)) as reader:
            return {i for (i,) in reader.execute("SELECT id FROM perqueue_activity")}

    before = left()
    for _ in range(100):
        more = outbox.prune(NOW + 1, 1000, 10)
        now = left()
        assert len(before - now) <= 10
        before = now
        if not more:
            break
    assert before == set(range(91, 101)) | set(range(3, 91, 3))
    assert outbox.position().pending == 10


def test_never_more_than_so_many_are_kept(outbox):
    """Beyond the limit the oldest delivered ones go, however young they are."""
    for n in range(60):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity in outbox.claim(0, 100):
        settle(outbox, activity, Event.ACCEPT, activity.id)
    while outbox.prune(0, 20, 10):
        pass
    assert sorted(outbox.settled(range(1, 61))) == list(range(41, 61))


def test_one_late_delivery_does_not_keep_the_rest(outbox):
    """Old activities are pruned although some with lower IDs were delivered only now."""
    for n in range(500):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity in outbox.claim(0, 1000):
        late = activity.id <= 60
        settle(outbox, activity, Event.ACCEPT, activity.id, at=NOW + 1_000_000 if late else NOW)
    for _ in range(40):
        outbox.prune(NOW + 1, 1000, 50)
    assert sorted(outbox.settled(range(1, 501))) == [*range(1, 61), 500]


def test_damaged_row_is_quarantined(outbox, path):
    """A row that is not what was recorded is kept and counted, and never claimed (invariant 2)."""
    for n in range(3):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    damage(path, 2)
    assert [activity.id for activity in outbox.claim(0, 10)] == [1, 3]
    assert outbox.position().damaged == 1
    assert outbox.position().pending == 2
    assert outbox.settled([2])[2].state is State.DAMAGED
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("SELECT user_id FROM perqueue_activity WHERE id = 2").fetchone() == ("XSER_1",)


def test_many_damaged_rows_hide_no_intact_one(outbox, path):
    """A claim looks past any number of damaged rows: none of them holds up the others (invariant 8)."""
    for n in range(40):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity_id in range(1, 40):
        damage(path, activity_id)
    assert [activity.id for activity in outbox.claim(0, 10)] == [40]
    assert outbox.position().pending == 1


def test_refused_row_that_is_damaged_later_is_counted_once(outbox, path):
    """Listing a refused activity whose row went wrong meanwhile leaves all counters as they are."""
    for n in range(3):
        outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
    for activity in outbox.claim(0, 2):
        settle(outbox, activity, Event.REJECT, activity.id)
    damage(path, 1)
    for _ in range(3):
        assert [activity.id for activity in outbox.rejected_since(0, 10)] == [2]
    position = outbox.position()
    assert (position.pending, position.rejected) == (1, 2)


def test_correcting_the_type_does_not_bless_a_damaged_row(outbox, path):
    """A refused activity whose row went wrong is not sent after `requeue` with another activity type."""
    outbox.append("GROUP", "USER", "TYPE", NOW)
    (activity,) = outbox.claim(0, 1)
    settle(outbox, activity, Event.REJECT, 1)
    damage(path, 1)
    outbox.requeue(None, "ANOTHER_TYPE")
    assert outbox.claim_due(2**62, 2**62, 10, ()) == []
    assert outbox.position().damaged == 1


def test_full_outbox_takes_nothing_more(path):
    """At max_pending record() stores nothing and says so, until something is delivered (invariant 1)."""
    with closing(SQLiteOutbox(path, ORIGIN, max_pending=10)) as outbox:
        for n in range(10):
            outbox.append("GROUP", f"USER_{n}", "TYPE", NOW)
        for _ in range(3):
            with pytest.raises(OutboxFull, match="max_pending is 10"):
                outbox.append("GROUP", "USER", "TYPE", NOW)
        assert outbox.position().last_id == 10
        for activity in outbox.claim(0, 4):
            settle(outbox, activity, Event.ACCEPT, activity.id)
        for n in range(4):
            outbox.append("GROUP", f"LATER_{n}", "TYPE", NOW)
        with pytest.raises(OutboxFull):
            outbox.append("GROUP", "USER", "TYPE", NOW)
        assert outbox.position().pending == 10


def test_any_bit_that_flips_is_noticed(outbox, path):
    """Whichever part of a row is changed on disk, the activity is not sent."""
    columns = {
        "billing_id": "'GROUQ'",
        "user_id": "user_id || 'X'",
        "activity_type_id": "'TYPF'",
        "recorded_at": "recorded_at + 1",
        "checksum": "checksum + 1",
    }
    for n, (column, value) in enumerate(columns.items(), 1):
        outbox.append("GROUP", "USER", "TYPE", NOW)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"UPDATE perqueue_activity SET {column} = {value} WHERE id = ?", (n,))
            connection.commit()
    assert outbox.claim(0, 10) == []
    assert outbox.position().damaged == len(columns)


def test_thousands_of_late_deliveries_do_not_keep_the_rest(outbox, path):
    """However many of the first were delivered late, what lies behind them is pruned in its time."""
    rows = [(i, NOW + 1_000_000 if i <= 5000 else NOW) for i in range(1, 6001)]
    with closing(sqlite3.connect(path)) as connection:
        connection.executemany(
            "INSERT INTO perqueue_activity (id, billing_id, user_id, activity_type_id, recorded_at, checksum)"
            " VALUES (?, 'GROUP', 'USER', 'TYPE', 0, 0)",
            [(i,) for i, _ in rows],
        )
        connection.executemany(
            "INSERT INTO perqueue_settlement"
            " (activity_id, state, settled_at, duration_ms, attempts, checksum) VALUES (?, 1, ?, 0, 1, ?)",
            [(i, at, settlement_checksum(i, 1, at, None, None)) for i, at in rows],
        )
        connection.execute("UPDATE perqueue_drain SET accepted = 6000")
        connection.commit()
    for _ in range(5):  # sweeps, which begin once a minute
        while outbox.prune(NOW + 1, 10_000, 50):
            pass
    assert len(outbox.settled(range(1, 5001))) == 5000
    assert sorted(outbox.settled(range(5001, 6001))) == [6000]
