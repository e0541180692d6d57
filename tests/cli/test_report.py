import csv
import io
import json

import pytest


@pytest.fixture
def used(perqueue, per):
    """Three users of two billing IDs, at Per."""
    for billing_id, user_id in (("GROUP_A", "USER_1"), ("GROUP_A", "USER_2"), ("007", "USER_1")):
        perqueue("record", billing_id, user_id)
    assert perqueue("drain").exit_code == 0


@pytest.mark.usefixtures("used")
def test_a_table(perqueue):
    """`report` prints a table with the IDs as they are, and the period on stderr."""
    result = perqueue("report", "--last", "1h")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["activity_type_id", "billing_id", "unique"]
    assert rows[2:] == [["TYPE", "GROUP_A", "2"], ["TYPE", "007", "1"]]
    assert result.stderr.endswith(" to now\n")


@pytest.mark.usefixtures("used")
def test_json_and_csv(perqueue):
    """`report` prints the same rows as JSON and as CSV."""
    rows = json.loads(perqueue("report", "--start", "2018-12-01", "--json").stdout)["rows"]
    assert rows[0] == {"activity_type_id": "TYPE", "billing_id": "GROUP_A", "unique": 2}
    text = perqueue("report", "--start", "2018-12-01", "--csv").stdout
    assert [{**row, "unique": int(row["unique"])} for row in csv.DictReader(io.StringIO(text))] == rows


@pytest.mark.parametrize(
    ("arguments", "query"),
    [
        ([], {}),
        (["--start", "2018-12-01"], {"start": "2018-12-01T00:00:00Z"}),
        (
            ["--start", "2018-12-01", "--end", "2018-12-31"],
            {"start": "2018-12-01T00:00:00Z", "end": "2018-12-31T23:59:59.999Z"},
        ),
        (["--start", "2018-12-01T01:00:00+01:00"], {"start": "2018-12-01T00:00:00Z"}),
        (["--start", "2018-12-01T12:00"], {"start": "2018-12-01T12:00:00Z"}),
    ],
)
def test_the_period_that_per_is_asked_for(perqueue, per, arguments, query):
    """A bare date is in UTC, an end includes its day, and without any Per chooses the prior month."""
    assert perqueue("report", *arguments).exit_code == 0
    assert per.request_log[-1].parameters == query


def test_per_is_away(perqueue, per):
    """`report` is exit code 1 and one line when Per cannot be asked."""
    per.go_down()
    result = perqueue("report")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)


def test_a_bad_token(perqueue):
    """`report` is exit code 1 when Per refuses the token, which is not shown."""
    result = perqueue("report", PER_REPORTING_TOKEN="swordfish")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "swordfish" not in result.output
