from enum import StrEnum
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perqueue import InvalidActivity
from perqueue._activity import (
    MAX_ID_BYTES,
    TRANSITIONS,
    Activity,
    Event,
    Settlement,
    State,
    checked_id,
    checksum,
)
from perqueue._outbox import Hold, OperatorOutbox, SQLiteOutbox

ORIGIN = "https://api.useper.com"

# Written out by hand, so that a change of the table needs a change here: one row for each state, one
# column for each event in the order of Event; None is an illegal move.
MOVES = {
    State.PENDING: (State.ACCEPTED, State.REJECTED, State.PENDING, State.DAMAGED, None, None),
    State.ACCEPTED: (None, None, None, None, None, None),
    State.REJECTED: (None, None, None, None, State.PENDING, State.DISCARDED),
    State.DISCARDED: (None, None, None, None, None, None),
    State.DAMAGED: (None, None, None, None, None, None),
}


class Group(StrEnum):
    """An enumeration of billing IDs, as programs have them."""

    FIRST = "GROUP_1"


class Shouting(str):
    """A `str` that shows itself differently from what it is."""

    __slots__ = ()

    def __str__(self):
        return self.upper()

    def __format__(self, spec):
        return "formatted"


@pytest.mark.parametrize(
    "value",
    [
        "GROUP_A",
        "x",
        "0",
        " ",
        "a b",
        "日本",
        "\U0001f600",
        "\n",
        "\uffff",
        "%",
        "x" * MAX_ID_BYTES,
        "é" * (MAX_ID_BYTES // 2),
    ],
)
def test_any_other_text_is_an_id(value):
    """Per has no expectation of an ID's format, so up to 400 bytes any text is taken as it is."""
    assert checked_id("user_id", value) is value


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "must not be empty"),
        (None, "not NoneType"),
        (7, "not int"),
        (1.5, "not float"),
        (True, "not bool"),
        (b"USER_1", "not bytes"),
        (["USER_1"], "not list"),
        ("USER\0_1", "NUL"),
        ("\0", "NUL"),
        ("USER_\ud800", "surrogate"),
        ("\udfff", "surrogate"),
        ("x" * (MAX_ID_BYTES + 1), "401 UTF-8 bytes"),
        ("é" * (MAX_ID_BYTES // 2) + "x", "401 UTF-8 bytes"),
        ("x" * 10_000_000, "10000000 UTF-8 bytes"),
    ],
)
def test_what_per_could_not_be_sent_is_refused(value, says):
    """An ID that is no text, empty, too long, or not UTF-8 is an `InvalidActivity` that is a `ValueError`."""
    with pytest.raises(InvalidActivity, match=says) as caught:
        checked_id("user_id", value)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("user_id ")
    assert len(str(caught.value)) < 120


@given(text=st.text())
def test_the_rule_for_ids_is_total(text):
    """Any text is either returned unchanged, or refused with `InvalidActivity` and nothing else."""
    good = 0 < len(text.encode("utf-8", "surrogatepass")) <= MAX_ID_BYTES and "\0" not in text
    good = good and not any(0xD800 <= ord(char) <= 0xDFFF for char in text)
    try:
        assert checked_id("user_id", text) == text
    except InvalidActivity:
        assert not good
    else:
        assert good


@pytest.mark.parametrize("bad", ["GEHEIM\0", "GEHEIM\ud800", "GEHEIM" * 100])
def test_the_text_of_the_error_does_not_show_the_id(bad):
    """An `InvalidActivity` may be logged: it names the parameter and the rule, never the ID (invariant 9)."""
    with pytest.raises(InvalidActivity) as caught:
        checked_id("billing_id", bad)
    assert "GEHEIM" not in f"{caught.value!s}{caught.value!r}"


@pytest.mark.parametrize(
    ("value", "plain"), [(Group.FIRST, "GROUP_1"), (Shouting("group"), "group"), (Shouting("x"), "x")]
)
def test_a_subclass_of_str_becomes_what_it_is(value, plain):
    """A member of an enumeration, or any other `str` subclass, is stored as the text that it is."""
    result = checked_id("billing_id", value)
    assert type(result) is str
    assert result == plain
    assert f"{result}" == plain


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair_of_state_and_event_is_a_legal_move_or_an_illegal_one(state, event):
    """The table holds every legal move, and no other (invariant 2)."""
    expected = MOVES[state][list(Event).index(event)]
    if expected is None:
        with pytest.raises(KeyError):
            TRANSITIONS[state, event]
    else:
        assert TRANSITIONS[state, event] is expected


def test_only_an_operator_takes_anything_out_of_rejected():
    """What Per says moves pending activities only;
    the moves out of rejected are an operator's (invariant 3).
    """
    assert {state for state, event in TRANSITIONS if event in (Event.REQUEUE, Event.DISCARD)} == {
        State.REJECTED
    }
    assert {state for state, event in TRANSITIONS if event not in (Event.REQUEUE, Event.DISCARD)} == {
        State.PENDING
    }


def test_the_stored_numbers_of_the_states_never_change():
    """Files that exist hold these numbers."""
    assert {state.name: state.value for state in State} == {
        "PENDING": 0,
        "ACCEPTED": 1,
        "REJECTED": 2,
        "DISCARDED": 3,
        "DAMAGED": 4,
    }


def settle(outbox, activity, event):
    settlement = Settlement(
        activity=activity,
        event=event,
        answered_at=2_000,
        transaction_id="t1" if event is Event.ACCEPT else None,
        reason=None if event is Event.ACCEPT else "no such group",
    )
    outbox.settle([settlement], drained_through=activity.id, refusals=(0, None))


@pytest.fixture
def operator(tmp_path):
    path = tmp_path / "activities.db"
    outbox = OperatorOutbox(path, ORIGIN)
    yield outbox
    outbox.close()


@pytest.fixture
def put(operator):
    """Record an activity and bring it into a state: `put(State.REJECTED)`."""

    def bring(state):
        operator.append("GROUP_A", "USER_1", "TYPE", 1_000)
        (activity,) = operator.claim(0, 1)
        if state in (State.REJECTED, State.DISCARDED):
            settle(operator, activity, Event.REJECT)
        if state is State.DISCARDED:
            assert operator.discard([activity.id]) == 1
        if state is State.ACCEPTED:
            settle(operator, activity, Event.ACCEPT)
        return activity

    return bring


@pytest.mark.parametrize("state", [State.PENDING, State.ACCEPTED, State.REJECTED, State.DISCARDED])
@pytest.mark.parametrize("event", [Event.REQUEUE, Event.DISCARD])
def test_an_operator_moves_only_what_was_rejected(operator, put, state, event):
    """Requeuing or discarding anything but a rejected activity changes nothing (invariant 3)."""
    activity = put(state)
    before = operator.position()
    move = operator.requeue if event is Event.REQUEUE else operator.discard
    assert move([activity.id]) == (1 if (state, event) in TRANSITIONS else 0)
    after = operator.position()
    if (state, event) in TRANSITIONS:
        assert after.rejected == 0
        assert after.pending == (1 if TRANSITIONS[state, event] is State.PENDING else 0)
    else:
        assert (after.pending, after.accepted, after.rejected) == (
            before.pending,
            before.accepted,
            before.rejected,
        )


@pytest.mark.parametrize("event", [Event.ACCEPT, Event.REJECT])
@pytest.mark.parametrize("state", [State.ACCEPTED, State.REJECTED, State.DISCARDED])
def test_a_settled_activity_is_not_settled_again(operator, put, state, event):
    """The first outcome that was written stands, and is counted once (invariant 2)."""
    activity = put(state)
    before = (operator.position(), operator.settled([activity.id]))
    settle(operator, activity, event)
    assert (operator.position(), operator.settled([activity.id])) == before


@pytest.mark.parametrize("event", [Event.REQUEUE, Event.DISCARD])
def test_the_drain_cannot_make_an_operators_move(operator, put, event):
    """An event that is illegal for a pending activity raises, and stores nothing."""
    activity = put(State.PENDING)
    with pytest.raises(KeyError):
        settle(operator, activity, event)
    assert operator.position().pending == 1


def test_taking_back_refusals_leaves_accepted_activities_alone(operator, put):
    """When a streak of refusals becomes pending again, what was accepted stays accepted (invariant 2)."""
    activity = put(State.ACCEPTED)
    hold = Hold(kind="refused", reason="no such type", until=5_000, wait_ms=1_000)
    operator.settle([], drained_through=0, refusals=(0, None), take_back=([activity.id], hold))
    assert (operator.position().accepted, operator.position().pending) == (1, 0)


@given(
    parts=st.tuples(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1), st.integers(0, 2**45)),
    other=st.tuples(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1), st.integers(0, 2**45)),
)
def test_a_checksum_is_stable_and_fits_the_column(parts, other):
    """Equal parts have equal checksums, which SQLite can store."""
    try:
        [part.encode() for part in (*parts[:3], *other[:3])]
    except UnicodeEncodeError:
        return
    assert checksum(*parts) == checksum(*parts)
    assert 0 <= checksum(*parts) < 2**32
    if parts == other:
        assert checksum(*parts) == checksum(*other)


def test_a_part_that_moves_from_one_id_to_the_next_changes_the_checksum():
    """The border between two IDs counts."""
    assert checksum("AB", "C", "T", 1) != checksum("A", "BC", "T", 1)


def test_an_activity_cannot_be_changed():
    """An activity in memory is what the outbox holds: frozen, and made by name only."""
    activity = Activity(id=1, billing_id="G", user_id="U", activity_type_id="T", recorded_at=1)
    with pytest.raises(AttributeError):
        activity.user_id = "V"
    with pytest.raises(TypeError):
        Activity(1, "G", "U", "T", 1)


def test_a_damaged_row_is_never_sent(tmp_path):
    """A row whose checksum does not fit is set aside as damaged, and kept (invariant 3)."""
    import sqlite3

    path = tmp_path / "activities.db"
    outbox = SQLiteOutbox(path, ORIGIN)
    try:
        outbox.append("GROUP_A", "USER_1", "TYPE", 1_000)
        outbox.append("GROUP_A", "USER_2", "TYPE", 1_000)
        with sqlite3.connect(path) as other:
            other.execute("UPDATE perqueue_activity SET user_id = 'USER_9' WHERE id = 1")
        other.close()
        assert [activity.user_id for activity in outbox.claim(0, 10)] == ["USER_2"]
        assert outbox.position().damaged == 1
        assert outbox.settled([1])[1].state is State.DAMAGED
        assert outbox.claim(0, 10)[0].id == 2
    finally:
        outbox.close()
