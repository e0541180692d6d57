import json
from dataclasses import fields
from datetime import UTC, datetime

import pytest

from perqueue import PerClient, ReconciliationRow
from perqueue.sandbox import Refuse


@pytest.fixture
def used(perqueue):
    """Two users, at Per."""
    perqueue("record", "GROUP_A", "USER_1")
    perqueue("record", "GROUP_A", "USER_2")
    assert perqueue("drain").exit_code == 0


@pytest.fixture
def stranger(options):
    """An activity that Per has from elsewhere."""
    with PerClient(**{**options, "activity_type_id": "TYPE"}) as client:
        client.add_activity("GROUP_A", "STRANGER")


@pytest.fixture
def reconciled(perqueue):
    def run(*arguments):
        result = perqueue("reconcile", "--start", "2018-12-01", "--json", *arguments)
        return result.exit_code, json.loads(result.stdout)

    return run


@pytest.mark.usefixtures("used")
def test_json_has_the_fields_of_a_row(reconciled):
    """`reconcile --json` has the period, whether the trail is complete, and the fields of Python's rows."""
    code, shown = reconciled()
    [row] = shown.pop("rows")
    assert shown == {"start": "2018-12-01T00:00:00.000Z", "end": None, "complete": True, "damaged": 0}
    assert list(row) == [field.name for field in fields(ReconciliationRow)]
    assert (code, row["verdict"], row["per_unique"], row["recorded_unique"]) == (0, "match", 2, 2)


@pytest.mark.usefixtures("used", "stranger")
def test_what_is_unexplained_is_exit_code_1(perqueue, reconciled):
    """An activity sent behind perqueue's back is unexplained: exit code 1, with the row and a reason."""
    code, shown = reconciled()
    [row] = shown["rows"]
    assert (code, row["verdict"], row["per_unique"], row["delivered_unique"]) == (1, "unexplained", 3, 2)
    result = perqueue("reconcile", "--start", "2018-12-01")
    assert result.exit_code == 1
    assert "unexplained" in result.stdout
    assert "something else feeds the same account" in result.stdout


@pytest.mark.usefixtures("used")
def test_an_explanation_says_which_activity_type_it_is_of(perqueue):
    """Of several types each line below the table names its own, for a billing ID may have them all."""
    perqueue("record", "GROUP_A", "USER_1", "-t", "EXPORT")
    shown = perqueue("reconcile", "--start", "2018-12-01").stdout
    assert shown.endswith("\nGROUP_A (EXPORT): 1 pending.\n")


def test_what_is_explained_is_exit_code_0(perqueue, per, reconciled):
    """Pending and rejected ones explain why fewer were delivered than recorded; the table fits 80 columns."""
    per.set_fault(Refuse("no"), times=1)
    perqueue("record", "GROUP_A", "USER_1")
    assert perqueue("drain").exit_code == 1
    perqueue("record", "GROUP_A", "USER_2")
    code, shown = reconciled()
    [row] = shown["rows"]
    assert (code, row["verdict"], row["pending"], row["rejected"]) == (0, "explained", 1, 1)
    lines = perqueue("reconcile", "--start", "2018-12-01").stdout.splitlines()
    assert lines[0].split() == [
        "billing", "ID", "Per", "delivered", "recorded", "pending", "rejected", "verdict"
    ]  # fmt: skip
    assert lines[-1] == "GROUP_A: 1 pending; 1 rejected."
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.usefixtures("used")
def test_an_explanation_of_many_is_given_once(perqueue):
    """Billing IDs that differ for the same reason share one line below the table."""
    for billing_id in ("GROUP_B", "GROUP_C", "GROUP_D"):
        perqueue("record", billing_id, "USER_1")
    perqueue("record", "GROUP_D", "USER_2")
    shown = perqueue("reconcile", "--start", "2018-12-01").stdout
    assert shown.endswith("\n\nGROUP_B, GROUP_C: 1 pending.\nGROUP_D: 2 pending.\n")


@pytest.mark.usefixtures("used")
def test_the_period_that_per_is_asked_for(perqueue, per):
    """Dates are those of `report`: an end includes its day, and none is the prior month."""
    today = datetime.now(UTC).date().isoformat()
    shown = json.loads(perqueue("reconcile", "--start", "2018-12-01", "--end", today, "--json").stdout)
    assert per.request_log[-1].parameters == {
        "start": "2018-12-01T00:00:00Z", "end": f"{today}T23:59:59.999Z"
    }  # fmt: skip
    assert shown["end"] == f"{today}T23:59:59.999Z"
    result = perqueue("reconcile")
    assert per.request_log[-1].parameters == {}
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No activity in this period" in result.stderr


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(
    ("arguments", "variables", "code"),
    [
        (["--end", "2018-12-31"], {}, 2),
        (["--start", "soon"], {}, 2),
        ([], {"PER_REPORTING_TOKEN": None}, 2),
        ([], {"PER_REPORTING_TOKEN": "wrong"}, 1),
        (["--outbox", "/nowhere/activities.db"], {}, 2),
    ],
)
def test_misuse_and_failure(perqueue, arguments, variables, code):
    """Without a period that can be meant, a token or an outbox there is one line, and no table."""
    result = perqueue("reconcile", *arguments, **variables)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)


@pytest.mark.usefixtures("used")
def test_the_report_of_another_per_is_not_asked_for(perqueue, per):
    """An outbox is not compared with the report of a Per that is not its own: one line, exit code 2."""
    result = perqueue("reconcile", PER_BASE_URL="http://127.0.0.1:9")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert per.url in result.stderr


@pytest.mark.usefixtures("used")
def test_a_date_without_hyphens_is_a_whole_day_too(perqueue, per):
    """`--end 20181231` includes that day, as `--end 2018-12-31` does."""
    perqueue("reconcile", "--start", "20181201", "--end", "20181231", "--tolerance", "1s")
    assert per.request_log[-1].parameters == {
        "start": "2018-12-01T00:00:00Z", "end": "2018-12-31T23:59:59.999Z"
    }  # fmt: skip


def test_a_bill_is_traced_to_single_activities(perqueue, per):
    """Behind each number of the report stand activities with Per's transaction IDs."""
    for user in ("USER_1", "USER_1", "USER_2"):
        perqueue("record", "GROUP_A", user)
    assert perqueue("drain").exit_code == 0
    [billed] = json.loads(perqueue("report", "--start", "2018-12-01", "--json").stdout)["rows"]
    traced = json.loads(perqueue("history", "--billing", "GROUP_A", "--json").stdout)
    assert len({row["user_id"] for row in traced if row["state"] == "accepted"}) == billed["unique"] == 2
    assert {row["transaction_id"] for row in traced} == {each.transaction_id for each in per.activities}
