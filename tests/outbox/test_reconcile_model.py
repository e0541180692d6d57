"""What reconcile says beside the truth: random histories of which the model knows what Per counted, and when.

The model plays the machines that record, the network and Per, by clocks finer than the outbox's. Only
what the library would have written is written; what nobody could know (when a request arrived) stays with
the model.
"""

import os
import shutil
from collections import defaultdict
from contextlib import closing
from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perqueue._activity import Event, Settlement
from perqueue._clock import Clock
from perqueue._outbox import OperatorOutbox, tally
from perqueue._reconcile import reconcile
from perqueue._report import Report

START = 1_772_323_200_000  # 2026-03-01, in milliseconds
LENGTH = 1000
NOW = START + 3 * LENGTH
ROUNDS = int(os.environ.get("PERQUEUE_MODEL_ROUNDS", "60"))

moments = st.one_of(
    st.integers(-600_000, 2_000_000),  # microseconds from the start of the period
    st.sampled_from([0, LENGTH * 1000]).flatmap(
        lambda edge: st.integers(edge - 3000, edge + 3000)
    ),  # as near to a boundary as it gets
)
durations = st.one_of(st.integers(0, 3000), st.integers(0, 900_000))
FAILURES = ("no answer within 10 s", "ReadError: gone", "HTTP 502")
UNSENT = ("ConnectError: refused", "HTTP 429")


def parts(duration):
    """Draw when in a request it arrives: from its sending to its answer."""
    return st.tuples(duration, st.integers(0, 1000)).map(lambda d: (d[0], d[0] * d[1] // 1000))


requests = st.fixed_dictionaries(
    {
        "after": st.one_of(st.integers(0, 3000), st.integers(0, 1_500_000)),
        "took": parts(durations),
        "counted": st.booleans(),  # of one that got no answer
        "why": st.sampled_from(FAILURES + UNSENT),
    }
)
ends = st.sampled_from(["accepted", "pending", "rejected", "discarded", "requeued", "damaged"])
activities = st.fixed_dictionaries(
    {
        "at": moments,
        "user": st.sampled_from("ABCD"),
        "group": st.sampled_from("GH"),
        "kind": st.sampled_from("TU"),
        "tries": st.lists(requests, max_size=2),
        "last": requests,
        "end": st.one_of(st.just("accepted"), ends),
    }
)
strangers = st.lists(
    st.tuples(moments, st.sampled_from("ABCDXYZ"), st.sampled_from("GH"), st.just("T")), max_size=2
)
prunings = st.one_of(st.none(), st.integers(0, LENGTH))

COLUMN = {"requeued": "pending", "discarded": "rejected"}


class World:
    """One outbox, and a Per that counts by arrival."""

    def __init__(self, outbox, *, is_over):
        self.outbox = outbox
        self.until = START + LENGTH if is_over else NOW
        self.counted = defaultdict(set)  # by key: whom Per has in its report
        self.from_here = defaultdict(set)
        self.possible = defaultdict(set)  # whom Per may have from here, for all that can be known
        self.columns = defaultdict(lambda: defaultdict(set))
        self.damaged = 0

    def arrive(self, key, user, at, *, here=True):
        """Let something reach Per, at a moment in microseconds since the epoch."""
        if START * 1000 <= at < (self.until + 1) * 1000:
            self.counted[key].add(user)
            if here:
                self.from_here[key].add(user)
        return START * 1000 <= at < (self.until + 1) * 1000

    def send(self, key, user, sent, answered):
        """Let it be known that a request was under way."""
        if answered >= (START - 3) * 1000 and sent <= (self.until + 3) * 1000:
            self.possible[key].add(user)

    def play(self, each):
        at = START * 1000 + each["at"]
        key, user = (each["kind"], each["group"]), each["user"]
        recorded = at // 1000
        number = self.outbox.append(each["group"], user, each["kind"], recorded)
        [activity] = self.outbox.claim(number - 1, 1)
        for one in each["tries"]:
            at += one["after"]
            took, way = one["took"]
            at += took
            if at >= NOW * 1000:
                at -= took
                break
            # Of a type that Per refuses, it counts none.
            if one["why"] in FAILURES and one["counted"] and each["end"] != "requeued":
                self.arrive(key, user, at - took + way)
            if one["why"] in FAILURES:
                self.send(("U", each["group"]) if each["end"] == "requeued" else key, user, at - took, at)
            self.settle(activity, Event.DEFER, at, took, reason=one["why"])
        self.end(each, activity, key, at)

    def end(self, each, activity, key, at):
        user, end, recorded = each["user"], each["end"], activity.recorded_at
        in_it = START <= recorded <= self.until
        took, way = each["last"]["took"]
        sent = at + each["last"]["after"]
        answered = sent + took
        if answered >= NOW * 1000:
            end = "pending"
        if end in ("rejected", "discarded", "requeued"):
            self.settle(activity, Event.REJECT, answered, took, reason="no")
        if end == "discarded":
            self.outbox.discard([activity.id])
        if end == "requeued":
            self.outbox.requeue([activity.id], "U")
            key = ("U", each["group"])
        if end == "damaged":
            with self.outbox._writing() as connection:
                connection.execute("UPDATE perqueue_activity SET user_id = '?' WHERE id = ?", (activity.id,))
            self.damaged += 1
            return
        if in_it:
            self.columns[key]["recorded"].add(user)
            self.columns[key][COLUMN.get(end, end)].add(user)
        if end == "accepted":
            self.arrive(key, user, sent + way)
            self.send(key, user, sent, answered)
            self.settle(activity, Event.ACCEPT, answered, took, transaction_id="T")
            if START <= answered // 1000 <= self.until:
                self.columns[key]["delivered"].add(user)

    def settle(self, activity, event, answered, took, **more):
        self.outbox.settle(
            [
                Settlement(
                    activity=activity,
                    event=event,
                    answered_at=answered // 1000,
                    duration_ms=took // 1000,
                    **more,
                )
            ],
            drained_through=0,
            refusals=(0, None),
        )


def moment(ms):
    return datetime.fromtimestamp(ms / 1000, UTC)


class Alone:
    """An outbox of its own for each story; the first is the pattern of the others."""

    def __init__(self, folder):
        self.folder, self.pattern, self.number = folder, folder / "pattern.db", 0
        OperatorOutbox(self.pattern, "https://api.useper.com").close()

    def __call__(self):
        for old in self.folder.glob(f"{self.number}.db*"):
            old.unlink()
        self.number += 1
        path = self.folder / f"{self.number}.db"
        shutil.copy(self.pattern, path)
        return closing(OperatorOutbox(path, None))


def tell(alone, played, foreign=(), *, is_over=True, pruned=None):
    """Play a story and compare; return the rows."""
    with alone() as outbox:
        world = World(outbox, is_over=is_over)
        for each in played:
            world.play(each)
        if pruned is not None:
            outbox.prune(START + pruned, 100, 100)
        for at, user, group, kind in foreign:
            world.arrive((kind, group), user, START * 1000 + at, here=False)
        check(world, outbox.path)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Alone(tmp_path_factory.mktemp("stories"))


@settings(max_examples=ROUNDS, suppress_health_check=list(HealthCheck))
@given(played=st.lists(activities, max_size=8), foreign=strangers, is_over=st.booleans(), pruned=prunings)
def test_no_verdict_contradicts_what_per_counted(alone, played, foreign, is_over, pruned):
    """Whatever happened: what came from here alone is never unexplained, and no match is of other users."""
    tell(alone, played, foreign, is_over=is_over, pruned=pruned)


def check(world, path):
    types = defaultdict(lambda: {"billingIds": {}})
    for (kind, group), users in world.counted.items():
        types[kind]["billingIds"][group] = {"unique": len(users)}
    end = moment(world.until) if world.until < NOW else None
    found = reconcile(
        path,
        lambda *_: Report({"activityTypes": dict(types)}),
        moment(START),
        end,
        Clock(wall=lambda: NOW / 1000),
    )
    rows = {(row.activity_type_id, row.billing_id): row for row in found}
    assert found.damaged <= world.damaged
    assert {key for key, users in world.counted.items() if users} <= rows.keys()
    for key, row in rows.items():
        said, here = world.counted[key], world.from_here[key]
        assert row.per_unique == len(said)
        if not found.complete:
            assert row.verdict != "match"
            continue
        columns = {name: len(users) for name, users in world.columns[key].items()}
        for name in ("recorded", "delivered", "pending", "rejected"):
            told = getattr(row, f"{name}_unique" if name in ("recorded", "delivered") else name)
            assert told == columns.get(name, 0), (name, row)
        if said == here:
            assert row.verdict != "unexplained", row  # a false alarm
        if row.verdict == "match":
            assert world.columns[key]["recorded"] == world.columns[key]["delivered"]
        if len(said - world.possible[key]) > len(world.possible[key] - said):
            assert row.verdict == "unexplained", row


def test_the_model_sees_a_planted_defect(alone, monkeypatch):
    """Were a user at the very edge of a period taken for certain, the model would raise the alarm."""
    monkeypatch.setattr(tally, "_ROUNDING_MS", 0)
    request = {"after": 0, "took": (1200, 0), "counted": False, "why": "HTTP 429"}
    early = {
        "at": -100,
        "user": "A",
        "group": "G",
        "kind": "T",
        "tries": [],
        "last": request,
        "end": "accepted",
    }

    def tell_all():
        for way in range(0, 1200, 100):
            for at in range(-1000, 0, 100):
                request["took"] = (1200, way)
                tell(alone, [{**early, "at": at}])

    with pytest.raises(AssertionError):
        tell_all()
