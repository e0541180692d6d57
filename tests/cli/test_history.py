import csv
import io
import json

import pytest

from perqueue.sandbox import Refuse, Status

COLUMNS = [
    "id", "billing_id", "user_id", "activity_type_id", "state", "recorded_at", "settled_at", "attempts",
    "transaction_id", "reason",
]  # fmt: skip


@pytest.fixture
def recorded(perqueue, per):
    """Number 1 accepted at the second attempt, 2 rejected, 3 pending; of two users and billing IDs."""
    per.set_fault(Status(502), times=1)
    assert perqueue("record", "GROUP_A", "USER_1").exit_code == 0
    assert perqueue("drain").exit_code == 0
    per.set_fault(Refuse("unknown_user"), times=1)
    perqueue("record", "GROUP_B", "USER_1")
    assert perqueue("drain").exit_code == 1
    perqueue("record", "GROUP_A", "USER_2")


@pytest.mark.usefixtures("recorded")
def test_json_and_csv_have_every_field(perqueue, make_queue):
    """`history --json` and `--csv` have the fields of `history()` by their names, times in ISO 8601."""
    rows = json.loads(perqueue("history", "--json").stdout)
    assert [list(row) for row in rows] == [COLUMNS] * 3
    assert [row["state"] for row in rows] == ["accepted", "rejected", "pending"]
    records = make_queue(drain=False).history()
    for row, record in zip(rows, records, strict=True):
        assert row["recorded_at"] == f"{record.recorded_at.isoformat(timespec='milliseconds')[:-6]}Z"
        assert (row["transaction_id"], row["reason"]) == (record.transaction_id, record.reason)
    printed = list(csv.DictReader(io.StringIO(perqueue("history", "--csv").stdout)))
    assert printed == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]


@pytest.mark.usefixtures("recorded")
def test_filters(perqueue):
    """User, billing ID, type and times must all fit; what all rows have in common is not repeated."""

    def ids(*arguments):
        return [row["id"] for row in json.loads(perqueue("history", "--json", *arguments).stdout)]

    assert ids("--user", "USER_1") == [1, 2]
    assert ids("--user", "USER_1", "--billing", "GROUP_A") == [1]
    assert ids("--activity-type", "OTHER") == ids("--until", "2018-12-01") == []
    assert ids("--since", "2018-12-01", "--limit", "2") == [1, 2]
    table = perqueue("history", "--user", "USER_1", "--billing", "GROUP_B")
    assert "unknown_user" in table.stdout
    assert "USER_1" not in table.stdout
    assert all(len(line) <= 80 for line in table.stdout.splitlines())


@pytest.mark.usefixtures("recorded")
def test_one_activity_with_its_attempts(perqueue, per):
    """`history --id` shows one activity, and each attempt with its time, duration and reason."""
    one = json.loads(perqueue("history", "--id", 1, "--json").stdout)
    assert list(one) == [*COLUMNS, "attempt_log"]
    assert (one["attempts"], one["transaction_id"]) == (2, per.activities[0].transaction_id)
    assert [attempt["reason"] for attempt in one["attempt_log"]] == ["HTTP 502", None]
    assert one["recorded_at"] <= one["attempt_log"][0]["attempted_at"] < one["settled_at"]
    shown = perqueue("history", "--id", 1).stdout
    assert "HTTP 502" in shown
    assert "accepted" in shown.splitlines()[-1]


@pytest.mark.usefixtures("recorded")
def test_what_is_not_there(perqueue):
    """A number that was never given is exit code 1, a filter that fits nothing an empty list."""
    result = perqueue("history", "--id", 99)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert perqueue("history", "--user", "nobody", "--json").stdout == "[]\n"
    assert perqueue("history", "--user", "nobody").stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "--csv"],
        ["--id", 1, "--user", "U"],
        ["--since", "yesterday"],
        ["--id", 0],
        ["--since", "2019-01-01", "--until", "2018-12-01"],
        ["--since", "2019-01-01", "--until", "20190101"],
    ],
)
def test_misuse(perqueue, make_queue, arguments):
    """What cannot be meant is exit code 2 and one line."""
    make_queue(drain=False)
    result = perqueue("history", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_a_long_table_says_that_it_is_cut(perqueue, make_queue):
    """A table stops at 1,000 rows and says so; as JSON there are all, in the order of recording."""
    queue = make_queue(drain=False)
    for _ in range(1001):
        queue.record("GROUP", "USER")
    table = perqueue("history")
    assert len(table.stdout.splitlines()) == 1002
    assert "first 1,000" in table.stderr
    assert [row["id"] for row in json.loads(perqueue("history", "--json").stdout)] == list(range(1, 1002))


def test_the_table_fits_a_terminal(perqueue, make_queue, monkeypatch):
    """`history` keeps to a terminal of 80 columns, times whole; in a pipe it cuts nothing."""
    with make_queue() as queue:
        receipt = queue.record("GROUP_A", "USER_1")
    monkeypatch.setattr("perqueue.cli._print.to_terminal", lambda: True)
    shown = perqueue("history", COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    [record] = make_queue(drain=False).history()
    assert f"{record.recorded_at:%Y-%m-%d %H:%M:%S}" in shown
    monkeypatch.undo()
    assert record.transaction_id in perqueue("history").stdout
    assert receipt.id == record.id
