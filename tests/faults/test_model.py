"""Over any history of faults, the outbox and Per tell one story: a state machine beside a model of it.

Two processes with one outbox record, deliver, are killed, are closed and come back, while Per misbehaves,
the clock jumps, the disk refuses writes, operators requeue and discard, and old activities are pruned. After
each step the file is read afresh and compared with what was recorded and with what Per answered.
"""

import contextlib
import os
import shutil
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from perqueue import (
    ActivityRejected,
    AuthenticationError,
    FlushTimeout,
    PerQueue,
    PerQueueError,
    RetryPolicy,
)
from perqueue._activity import State
from perqueue._outbox import OperatorOutbox
from tests.faults._planted import DEFECTS
from tests.faults._rounds import SOAK, rounds
from tests.faults._virtual import MODES, REQUEST_TIMEOUT, TOKEN, FakePer, Line, World, read

IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Thousands of files that live for milliseconds; that they would survive is not tested here."""
WALL = 1_800_000_000
YEAR = 365.25 * 86_400
POLICY = RetryPolicy(base=0.2, cap=5.0, retry_after_cap=10.0, activity_cap=10.0)
OPTIONS = {
    "activity_token": TOKEN,
    "activity_type_id": "TYPE",
    "max_in_flight": 4,
    "retry": POLICY,
    "request_timeout": REQUEST_TIMEOUT,
    "exit_timeout": 0.5,
}
ids = st.sampled_from([" ", "a b ", "&x=1+%00", "A\u0301", "\r\n", "/../?#"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
kinds = st.sampled_from(["TYPE", "TYPE", "OTHER TYPE", "REFUSED", "BROKEN"])
places = st.sampled_from([0, 1])
modes = st.sampled_from(MODES)
moments = st.sampled_from([0.005, 0.02, 0.1, 1.0, 5.0, 70.0])


class Faults(RuleBasedStateMachine):
    """Up to two processes with one outbox, and what must be true of it."""

    template = None

    def __init__(self):
        super().__init__()
        if Faults.template is None:
            Faults.template = Path(tempfile.mkdtemp()) / "outbox.db"
            OperatorOutbox(Faults.template, "https://api.useper.com").close()
        self.folder = Path(tempfile.mkdtemp(dir=IN_MEMORY))
        self.path = self.folder / "0.db"
        shutil.copy(Faults.template, self.path)
        self.world = World(WALL)
        self.per = FakePer(self.world.loop)
        self.queues = [None, None]
        self.lines = [None, None]
        self.users = {}  # ID -> user, of all that record() returned for
        self.recorded_at = {}
        self.last_id = self.pauses = self.numbers = 0
        self.states = {}  # as the step before has left them
        self.pruned = {}  # ID -> its last state
        self.requeued = set()
        self.receipts = {}
        self.sound = True
        self.rejected_to = set()  # IDs that on_rejected was called with

    # -- processes

    @initialize()
    def begin(self):
        self.start(0)

    def start(self, place):
        self.lines[place] = Line(self.per)
        self.queues[place] = PerQueue(
            self.path,
            transport=self.lines[place].transport,
            on_rejected=lambda activity: self.rejected_to.add(activity.id),
            **OPTIONS,
        )

    @rule(place=places)
    def open_or_close(self, place):
        """A process starts, or ends as it should."""
        if self.queues[place] is None:
            self.start(place)
        else:
            self.queues[place].close()
            self.gone(place)

    def gone(self, place):
        self.queues[place] = None
        self.receipts = {
            i: (where, receipt) for i, (where, receipt) in self.receipts.items() if where != place
        }

    @precondition(lambda self: any(self.queues))
    @rule(data=st.data())
    def kill(self, data):
        """One process is gone in an instant; nothing of it writes any more."""
        place = data.draw(st.sampled_from([i for i, queue in enumerate(self.queues) if queue]))
        self.queues[place]._outbox.close()
        self.lines[place].cut = True
        self.forget_what_was_not_stored()
        self.queues[place].close()
        self.gone(place)

    @precondition(lambda self: any(self.queues))
    @rule()
    def kill_all(self):
        """Every process is gone in an instant: the next ones find the three files as they were."""
        alive = [queue for queue in self.queues if queue is not None]
        path = self.folder / f"{int(self.path.stem) + 1}.db"
        for line in filter(None, self.lines):
            line.cut = True
        for queue in alive:
            queue._outbox._lock.acquire()
            queue._outbox._disk._checkpoint_lock.acquire()
        # This drops SQLite's locks on these files in this process: nobody needs them any more.
        for suffix in ("", "-wal", "-shm"):
            shutil.copy(f"{self.path}{suffix}", f"{path}{suffix}")
        for queue in alive:
            queue._outbox._disk._checkpoint_lock.release()
            queue._outbox._lock.release()
            queue._outbox.close()
        self.path = path
        self.forget_what_was_not_stored()
        for place, queue in enumerate(self.queues):
            if queue is not None:
                queue.close()
                self.gone(place)

    def forget_what_was_not_stored(self):
        """What Per had answered and the file does not know may come again, and so may an early request."""
        rows, counters = read(self.path)
        stored = {row[2] for row in rows.values() if row[5] == State.ACCEPTED}
        self.per.unsure |= self.per.accepted.keys() - stored
        stored = counters["hold"] == "retry_after"
        until = counters["hold_until"] / 1000 - self.world.wall if stored else float("-inf")
        self.per.quiet_until = min(self.per.quiet_until, until)

    # -- what programs do

    def queue_at(self, place):
        if self.queues[place] is None:
            self.start(place)
        return self.queues[place]

    @rule(place=places, billing_id=ids, user=ids, kind=kinds, count=st.sampled_from([1, 1, 2, 5, 24]))
    def record(self, place, billing_id, user, kind, count):
        queue = self.queue_at(place)
        for _ in range(count):
            self.numbers += 1
            name = f"{self.numbers} {user}"
            self.per.recorded[name] = (billing_id, kind)
            receipt = queue.record(billing_id, name, activity_type_id=kind)
            assert receipt.id > self.last_id
            self.last_id = receipt.id
            self.users[receipt.id] = name
            self.recorded_at[receipt.id] = int((self.world.wall + self.world.loop.now) * 1000)
            self.receipts[receipt.id] = (place, receipt)

    @rule(place=places, timeout=st.sampled_from([0.0, 1.0, 20.0]))
    def flush(self, place, timeout):
        """Whatever a flush says, it is true, and it says it in time."""
        queue = self.queue_at(place)
        pending = [i for i, row in self.rows().items() if row[5] == State.PENDING]
        began = self.world.loop.now
        try:
            self.world.run(queue.aflush(timeout))
        except PerQueueError as error:
            self.check_error(error)
        else:
            rows = self.rows()
            assert [i for i in pending if i in rows and rows[i][5] != State.ACCEPTED] == []
            assert all(self.users[i] in self.per.accepted for i in pending)
        assert self.world.loop.now - began <= timeout + 0.6

    def check_error(self, error):
        if isinstance(error, ActivityRejected):
            assert error.reason in {"unknown activity type", "no such company"}
        elif isinstance(error, AuthenticationError):
            assert error.code == "invalid_auth_token"
        else:
            assert type(error) is FlushTimeout
            assert error.pending > 0
            assert error.reason

    @precondition(lambda self: self.receipts)
    @rule(data=st.data())
    def wait_for_a_receipt(self, data):
        """Whatever a receipt says is what Per said of this one activity."""
        i = data.draw(st.sampled_from(sorted(self.receipts)))
        user = self.users[i]
        try:
            transaction = self.world.result(self.receipts[i][1])
        except PerQueueError as error:
            self.check_error(error)
        else:
            assert transaction in self.per.accepted[user]

    # -- what happens to them

    @rule(mode=modes)
    def per_behaves(self, mode):
        self.per.mode = mode

    @rule(script=st.lists(modes, min_size=1, max_size=8))
    def per_answers(self, script):
        self.per.script.extend(script)

    @rule(seconds=moments)
    def time_passes(self, seconds):
        self.world.wait(seconds)

    @rule(seconds=st.sampled_from([-10 * YEAR, -3600, -300, -2, 2, 300, 3600, 10 * YEAR]))
    def the_wall_clock_jumps(self, seconds):
        self.world.wall = min(max(WALL - 20 * YEAR, self.world.wall + seconds), WALL + 20 * YEAR)
        self.per.quiet_until = min(self.per.quiet_until, self.world.loop.now)

    @precondition(lambda self: self.queues.count(None) == 1)
    @rule(count=st.sampled_from([0, 1, 8]), seconds=st.sampled_from([1.0, 8.0]))
    def disk_refuses_writes(self, count, seconds):
        """While outcomes cannot be stored nothing is sent, once that is known (invariant 12)."""
        place, queue = next((i, queue) for i, queue in enumerate(self.queues) if queue is not None)
        if count:
            self.record(place=place, billing_id="GROUP", user="USER", kind="TYPE", count=count)
            self.per.script.extend(["slow"] * count)
        connection = queue._outbox._usable()
        connection.execute("PRAGMA query_only = 1")
        self.world.wait(3 * REQUEST_TIMEOUT)
        sent, troubled = self.per.requests, queue._worker.trouble
        self.world.wait(seconds)
        if troubled:
            assert queue.stats().state == "paused"
            assert self.per.requests == sent
        connection.execute("PRAGMA query_only = 0")

    # -- what operators do

    @rule(kind=st.sampled_from([None, "TYPE"]), every=st.booleans(), data=st.data())
    def requeue(self, kind, every, data):
        rejected = [i for i, state in self.states.items() if state is State.REJECTED]
        chosen = None if every or not rejected else [data.draw(st.sampled_from(rejected))]
        with closing(OperatorOutbox(self.path, None)) as operator:
            assert operator.requeue(chosen, kind) == len(rejected if chosen is None else chosen)
        self.requeued.update(rejected if chosen is None else chosen)
        if kind is not None:
            for i in rejected if chosen is None else chosen:
                user = self.users[i]
                self.per.recorded[user] = (self.per.recorded[user][0], kind)

    @precondition(lambda self: State.REJECTED in self.states.values())
    @rule(data=st.data())
    def discard(self, data):
        i = data.draw(st.sampled_from([i for i, state in self.states.items() if state is State.REJECTED]))
        with closing(OperatorOutbox(self.path, None)) as operator:
            assert operator.discard([i]) == 1
        self.states[i] = State.DISCARDED

    @rule(keep=st.integers(0, 5), limit=st.integers(1, 50))
    def prune(self, keep, limit):
        with closing(OperatorOutbox(self.path, None)) as operator:
            operator.prune(2**62, keep, limit)

    # -- what must be true

    def rows(self):
        return read(self.path)[0]

    @invariant()
    def the_file_tells_what_happened(self):
        self.sound = False
        assert not self.per.wrong, self.per.wrong
        rows, counters = read(self.path)
        taken_back = counters["holds"] > self.pauses
        self.pauses = counters["holds"]
        for i in self.users.keys() - rows.keys() - self.pruned.keys():
            state = self.states.pop(i, State.PENDING)
            if state is State.PENDING and self.per.told.intersection(
                self.per.accepted.get(self.users[i], ())
            ):
                state = State.ACCEPTED  # and pruned at once: the clock had jumped since the answer
            assert state in (State.ACCEPTED, State.DISCARDED), f"{i} was deleted undelivered"
            self.pruned[i] = state
        assert rows.keys() == self.users.keys() - self.pruned.keys()
        for i, row in rows.items():
            self._check_row(i, row, taken_back=taken_back)
        self.requeued.clear()
        self._check_counters(counters)
        pending = {i for i, state in self.states.items() if state is State.PENDING}
        waiting = {i for i, row in rows.items() if row[8]}
        assert waiting <= pending
        assert {i for i in pending if i <= counters["drained_through"]} <= waiting
        self.sound = True

    def _check_row(self, i, row, *, taken_back):
        _, billing_id, user, kind, recorded_at, number, transaction, reason, _ = row
        assert user == self.users[i]
        assert (billing_id, kind) == self.per.recorded[user]
        assert recorded_at == self.recorded_at[i]
        before, state = self.states.get(i, State.PENDING), State(number)
        if before is State.REJECTED and state is not before:
            assert i in self.requeued or taken_back
        elif before is not State.PENDING:
            assert state is before
        if state is State.ACCEPTED:
            assert transaction in self.per.told.intersection(self.per.accepted.get(user, ()))
            self.per.settled.add(user)
        elif state is State.REJECTED:
            assert reason in self.per.refused.get(user, ())
            assert i in self.rejected_to
        self.states[i] = state

    def _check_counters(self, counters):
        of = dict.fromkeys(State, 0)
        for state in [*self.states.values(), *self.pruned.values()]:
            of[state] += 1
        assert counters["accepted"] == of[State.ACCEPTED]
        assert counters["rejected"] == of[State.REJECTED]
        assert counters["discarded"] == of[State.DISCARDED]
        assert counters["pruned"] == len(self.pruned)
        for queue in filter(None, self.queues):
            stats = queue.stats()
            assert (stats.pending, stats.delivered) == (of[State.PENDING], of[State.ACCEPTED])
            assert stats.rejected == of[State.REJECTED]
            assert (stats.oldest_pending_age is None) == (stats.pending == 0)

    def teardown(self):
        with contextlib.ExitStack() as endings:
            endings.callback(shutil.rmtree, self.folder)
            endings.callback(self.world.close)
            endings.callback(self.close_all)
            if self.sound:
                self.all_is_delivered_in_the_end()

    def close_all(self):
        with contextlib.ExitStack() as endings:
            for queue in filter(None, self.queues):
                endings.callback(queue._outbox.close)  # whatever becomes of the rest, no thread is left
                endings.callback(queue.close)

    def all_is_delivered_in_the_end(self):
        """Once Per accepts everything again, nothing stays pending for more than the longest wait."""
        self.per.heal()
        self.queue_at(0)._worker.start()  # one that has never recorded leaves another's backlog alone
        for _ in range(200):
            if State.PENDING not in [State(row[5]) for row in self.rows().values()]:
                break
            self.world.wait(1.0)
        self.the_file_tells_what_happened()
        assert State.PENDING not in self.states.values(), "something was forgotten"
        delivered = {i for i, state in {**self.states, **self.pruned}.items() if state is State.ACCEPTED}
        assert {self.users[i] for i in delivered} <= self.per.accepted.keys()


def _settings(examples, steps, **more):
    return settings(max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True, **more)


Faults.TestCase.settings = _settings(rounds(60, 1500), rounds(30, 50))


@pytest.mark.timeout(rounds(120, 1800))
class TestFaults(Faults.TestCase):
    """Nothing is lost, altered, forgotten or told wrongly, whatever happens (all invariants)."""


@pytest.mark.timeout(rounds(120, 600))
@pytest.mark.parametrize("defect", DEFECTS if SOAK else DEFECTS[:3], ids=lambda defect: defect.__name__)
def test_model_sees_a_planted_defect(defect, monkeypatch):
    """A perqueue that breaks a promise is found out by the same model: it can fail."""
    defect(monkeypatch)
    quickly = _settings(300, 30, phases=[Phase.generate], database=None, report_multiple_bugs=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Faults, settings=quickly)
