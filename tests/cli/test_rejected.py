import json
from datetime import timedelta
from importlib import import_module

import pytest

from perqueue.sandbox import Refuse


@pytest.fixture
def refused(perqueue, per):
    """Three activities that Per refused, numbers 1 to 3, and one that it accepted."""
    per.set_fault(Refuse("unknown_type"), when=lambda activity: activity.user_id != "USER_4")
    for number in (1, 2, 3, 4):
        assert perqueue("record", "GROUP_A", f"USER_{number}").exit_code == 0
    assert perqueue("drain").exit_code == 1
    assert per.accepted == 1
    per.clear_faults()


@pytest.fixture
def listed(perqueue):
    return lambda: json.loads(perqueue("rejected", "list", "--json").output)


@pytest.mark.usefixtures("refused")
def test_list(perqueue, listed, make_queue):
    """`rejected list` shows each with the columns of the outbox's log, Per's reason and the times."""
    rows = listed()
    assert sorted(row["id"] for row in rows) == [1, 2, 3]
    row = next(row for row in rows if row["id"] == 2)
    assert (row["billing_id"], row["user_id"], row["activity_type_id"]) == ("GROUP_A", "USER_2", "TYPE")
    assert (row["reason"], row["attempts"]) == ("unknown_type", 1)
    with make_queue(drain=False)._outbox._reading() as connection:
        log = connection.execute("SELECT * FROM perqueue_activity_log WHERE id = 2")
        columns = [column for (column, *_) in log.description]
        stored = dict(zip(columns, log.fetchone(), strict=True))
    assert row == {name: stored[name] for name in row}
    table = perqueue("rejected", "list").output
    assert "unknown_type" in table
    assert "USER_3" in table


@pytest.mark.usefixtures("refused")
def test_a_long_list_ends_and_says_so(perqueue, monkeypatch):
    """A table stops at 1,000 rows, or where it is asked to, and says how many there are; JSON has all."""
    table = perqueue("rejected", "list", "--limit", "2")
    assert table.stdout.count("unknown_type") == 2
    assert "first 2 of 3:" in table.stderr
    assert len(json.loads(perqueue("rejected", "list", "--limit", "2", "--json").stdout)) == 2
    monkeypatch.setattr(import_module("perqueue.cli.rejected"), "TABLE_LIMIT", 1)
    assert "first 1 of 3:" in perqueue("rejected", "list").stderr
    assert len(json.loads(perqueue("rejected", "list", "--json").stdout)) == 3
    assert "first" not in perqueue("rejected", "list", "--limit", "3").stderr


def test_an_empty_list(perqueue, listed, make_queue):
    """`rejected list` of an outbox without any is an empty list, and no failure."""
    make_queue(drain=False)
    assert listed() == []
    result = perqueue("rejected", "list")
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.usefixtures("refused")
def test_the_list_fits_a_terminal(perqueue, per, monkeypatch):
    """`rejected list` keeps to the width of a terminal, however long an ID is; in a pipe it cuts nothing."""
    per.set_fault(Refuse("unknown_type"))
    perqueue("record", "GROUP_A", "U" * 400)
    perqueue("drain")
    assert "U" * 400 in perqueue("rejected", "list").stdout
    monkeypatch.setattr("perqueue.cli._print.to_terminal", lambda: True)
    shown = perqueue("rejected", "list", COLUMNS="80").stdout
    assert all(text in shown for text in ("USER_1", "UUU…", "unknown_type"))
    assert max(map(len, shown.splitlines())) == 80


@pytest.mark.usefixtures("refused")
def test_requeue_with_a_corrected_type(perqueue, per, listed):
    """`rejected requeue` makes the named ones pending again, with another activity type if one is given."""
    result = perqueue("rejected", "requeue", "1", "3", "--activity-type", "RIGHT")
    assert (result.exit_code, result.output) == (0, "requeued 2 activities\n")
    assert perqueue("drain").exit_code == 0
    types = {activity.user_id: activity.activity_type_id for activity in per.activities}
    assert {types["USER_1"], types["USER_3"]} == {"RIGHT"}
    assert [row["id"] for row in listed()] == [2]


def test_one_with_a_corrected_type_stands_for_none_of_the_old_one(perqueue, per, make_queue):
    """With `coalesce`, the next activity of the old type is recorded: Per may know that type by now."""
    per.set_fault(Refuse("unknown_type"), times=1)
    daily = timedelta(days=1)
    first = make_queue(coalesce=daily, drain=False).record("GROUP_A", "USER_1")
    assert perqueue("drain").exit_code == 1
    assert perqueue("rejected", "requeue", "--all", "--activity-type", "RIGHT").exit_code == 0
    assert make_queue(coalesce=daily, drain=False).record("GROUP_A", "USER_1").id != first.id
    assert perqueue("drain").exit_code == 0
    kinds = [activity.activity_type_id for activity in per.activities]
    assert (len(kinds), kinds.count("RIGHT")) == (2, 1)


@pytest.mark.usefixtures("refused")
def test_requeue_all(perqueue, per, listed):
    """`rejected requeue --all` makes all pending again, and then Per gets them."""
    assert perqueue("rejected", "requeue", "--all").output == "requeued 3 activities\n"
    assert perqueue("drain").exit_code == 0
    assert (per.accepted, listed()) == (4, [])


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("command", [["requeue"], ["discard", "--yes"]])
def test_one_that_is_not_rejected_is_told(perqueue, listed, command):
    """Naming an activity that is not rejected is exit code 1; the others are done all the same."""
    result = perqueue("rejected", *command, "2", "4", "4", "999")
    assert result.exit_code == 1
    assert result.stdout.endswith("1 activity\n")
    assert "2 of these are not rejected" in result.stderr
    assert sorted(row["id"] for row in listed()) == [1, 3]


@pytest.mark.usefixtures("refused")
def test_discard(perqueue, per, listed):
    """`rejected discard` gives activities up for good: they are not sent, and stay in the audit trail."""
    assert perqueue("rejected", "discard", "--all", "--yes").output == "discarded 3 activities\n"
    assert listed() == []
    assert perqueue("drain").exit_code == 0
    assert per.accepted == 1
    shown = json.loads(perqueue("status", "--json").output)
    assert (shown["rejected"], shown["discarded"], shown["pending"]) == (0, 3, 0)


@pytest.mark.usefixtures("refused")
def test_a_bad_type_changes_nothing(perqueue, listed):
    """A type that Per could not be sent is exit code 2, and nothing is requeued."""
    assert perqueue("rejected", "requeue", "--all", "-t", "").exit_code == 2
    assert len(listed()) == 3
