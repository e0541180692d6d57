"""What an operator does with all that Per refused."""

import sqlite3
from contextlib import closing

import pytest

from perqueue._activity import Event, Settlement
from perqueue._outbox import OperatorOutbox

REFUSED = 120


@pytest.fixture
def operator(outbox):
    """An outbox with more refused activities than one transaction takes."""
    with closing(OperatorOutbox(outbox, "http://127.0.0.1")) as opened:
        for n in range(REFUSED):
            opened.append("GROUP", f"USER_{n}", "TYPE", 1)
        refuse(opened, opened.claim(0, REFUSED))
        yield opened


def refuse(opened, activities):
    settlements = [Settlement(activity=a, event=Event.REJECT, answered_at=2, reason="no") for a in activities]
    opened.settle(settlements, drained_through=REFUSED, refusals=(0, None))


@pytest.mark.parametrize("move", ["requeue", "discard"])
def test_all_are_moved_however_many(operator, move):
    """`--all` moves every refused activity, in as many transactions as it takes."""
    assert getattr(operator, move)(None) == REFUSED
    assert operator.position().rejected == 0


def test_what_is_refused_again_meanwhile_is_left_alone(operator, monkeypatch):
    """`requeue --all` ends although a drain has everything refused again at once."""
    look = operator.settled

    def settled(activity_ids):
        known = look(activity_ids)
        again = operator.claim_waiting(0, REFUSED)
        if again:
            refuse(operator, again)
        return known

    monkeypatch.setattr(operator, "settled", settled)
    assert operator.requeue(None) == REFUSED
    assert operator.position().rejected + operator.position().pending == REFUSED


def test_a_damaged_row_is_not_sent_under_a_corrected_type(operator):
    """Its new checksum would pass it off as what was recorded."""
    with closing(sqlite3.connect(operator.path)) as connection, connection:
        connection.execute("UPDATE perqueue_activity SET user_id = 'USER_X' WHERE id = 5")
    operator.requeue([4, 5], "RIGHT")
    assert [activity.id for activity in operator.claim_waiting(0, REFUSED)] == [4]
    assert operator.position().damaged == 1
