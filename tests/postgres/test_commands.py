"""The command with an outbox in a database: what it shows, and what it says when there is none."""

import json
import os

import pytest

SECRET = "s3cret"


@pytest.mark.parametrize("arguments", [["status"], ["status", "--check"], ["history"], ["rejected", "list"]])
def test_a_database_without_an_outbox_is_told(perqueue, arguments):
    """A command that looks at an outbox creates none, and says so without the password."""
    result = perqueue(*arguments)
    assert result.exit_code in (1, 2)
    assert "there is no outbox in postgresql://perqueue:***@" in result.output
    assert SECRET not in result.output


def test_status_shows_who_drains(per, make_queue, perqueue):
    """`status` names the outbox without its password, and every drainer by host and process."""
    make_queue().record("GROUP", "USER").wait(10)
    shown = perqueue("status").output
    assert f"process {os.getpid()} on {os.uname().nodename}" in shown
    assert SECRET not in shown
    plain = json.loads(perqueue("status", "--json").output)
    assert (plain["pending"], plain["delivered"], plain["drained"]) == (0, 1, True)
    assert plain["outbox"].startswith("postgresql://perqueue:***@")


def test_status_counts_what_waits(make_queue, perqueue):
    """Without a drainer `status` shows what is pending, and `--check` fails when it is too old."""
    make_queue(drain=False).record("GROUP", "USER")
    plain = json.loads(perqueue("status", "--json").output)
    assert (plain["pending"], plain["drained"], plain["drainer_pid"]) == (1, False, None)
    assert perqueue("status", "--check").exit_code == 0
    late = perqueue("status", "--check", "--max-age", "0s")
    assert (late.exit_code, "nobody drains" in late.output) == (1, True)


def test_record_and_drain(per, perqueue):
    """`record` creates the outbox and prints the number; `drain` delivers it."""
    assert perqueue("record", "GROUP", "USER").output.strip() == "1"
    assert perqueue("drain").exit_code == 0
    assert per.unique("GROUP") == 1


def test_watching_is_what_the_programs_need(per, start, make_queue):
    """`drain --watch` delivers what any process records, and ends with 0."""
    program = start("drain", "--watch")
    assert "watching postgresql://perqueue:***@" in program.err.next(20)
    make_queue(drain=False).record("GROUP", "USER").wait(20)
    program.process.terminate()
    code, _, _ = program.wait()
    assert code == 0


def findings(result):
    """Return what `doctor --json` found: levels by what they are about."""
    return {finding["about"]: finding["level"] for finding in json.loads(result.stdout)["findings"]}


def test_doctor_looks_at_server_and_drainers(per, make_queue, perqueue):
    """`doctor` names server, drainer and schema, and finds nothing wrong with what is in use."""
    make_queue().record("GROUP", "USER").wait(10)
    shown = perqueue("doctor").stdout
    assert f"process {os.getpid()} on {os.uname().nodename} delivers" in shown
    assert "PostgreSQL 1" in shown
    assert SECRET not in shown
    found = findings(perqueue("doctor", "--json"))
    assert found["server"] == found["tables"] == found["connections"] == found["delivery"] == "ok"
    assert found["durability"] == "warning"  # this server's data need survive no power cut
    assert "sqlite" not in found  # whose defects are no matter here


def test_doctor_says_what_is_wrong(per, make_queue, perqueue, sql):
    """Nobody delivers what is old, a drainer fell silent, a clock was wrong, an activity was refused."""
    queue = make_queue(drain=False)
    queue.record("GROUP", "USER")
    sql(
        "UPDATE perqueue_pending SET recorded_at = recorded_at - 600000",
        "INSERT INTO perqueue_drainer (owner, host, pid, alive_until)"
        " VALUES (1, 'gone', 7, clock_timestamp() - interval '1 minute')",
        "INSERT INTO perqueue_settled (id, billing_id, user_id, activity_type_id, recorded_at, state,"
        " settled_at, duration_ms, tries, reason, rejection)"
        " VALUES (99, 'G', 'U', 'T', 1, 2, 1, 1, 1, 'no such type', 1)",
        "UPDATE perqueue_outbox SET trail_lost_through = 1",
    )
    result = perqueue("doctor", "--offline", "--json")
    assert result.exit_code == 1
    found = findings(result)
    assert (found["delivery"], found["rejected"], found["trail"]) == ("problem", "warning", "ok")
    told = perqueue("doctor", "--offline").stdout
    assert "process 7 on gone has not been heard of" in told
    assert "'no such type'" in told
    sql("UPDATE perqueue_pending SET recorded_at = recorded_at + 86400000")
    assert findings(perqueue("doctor", "--offline", "--json"))["dates"] == "problem"


def test_doctor_notices_a_right_that_is_missing(make_queue, perqueue, outbox, sql):
    """A role that may not do all that a drainer does, in each of the tables, is told; one that may is not."""
    make_queue(drain=False)
    schema = outbox.rpartition("%3D")[2]
    sql(f"CREATE ROLE {schema} LOGIN PASSWORD 's3cret'", f"GRANT USAGE ON SCHEMA {schema} TO {schema}")
    tables = f"ALL TABLES IN SCHEMA {schema}"
    sql(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {schema}")
    theirs = outbox.replace("//perqueue:", f"//{schema}:")

    def told():
        return findings(perqueue("doctor", "--offline", "--json", "--outbox", theirs))["tables"]

    assert told() == "ok"
    sql(f"REVOKE DELETE ON perqueue_pending FROM {schema}")
    assert told() == "problem"
    sql(f"GRANT DELETE ON perqueue_pending TO {schema}", f"REVOKE INSERT ON perqueue_settled FROM {schema}")
    assert told() == "problem"


def test_doctor_without_a_database_goes_on_with_the_rest(perqueue, outbox, database):
    """No server, no outbox: one problem that says why, and machine and tokens are looked at all the same."""
    found = findings(perqueue("doctor", "--offline", "--json"))
    assert (found["database"], found["perqueue"]) == ("problem", "ok")
    nowhere = outbox.replace(f":{outbox.rpartition(':')[2].partition('/')[0]}/", ":1/")
    result = perqueue("doctor", "--offline", "--json", "--outbox", nowhere)
    assert (result.exit_code, findings(result)["database"]) == (1, "problem")
    assert SECRET not in result.output


def test_salvage_is_for_files(perqueue, tmp_path):
    """`--salvage` says that a database has tools of its own."""
    result = perqueue("doctor", "--salvage", str(tmp_path / "new.db"))
    assert result.exit_code == 2
    assert "is a database: its own tools look after it" in result.output


@pytest.mark.parametrize("command", [["status"], ["doctor", "--offline"], ["history"], ["rejected", "list"]])
def test_who_looks_mends_nothing(make_queue, perqueue, sql, command):
    """A table that somebody dropped is told to whoever looks, with the remedy, and stays as it is."""
    make_queue(drain=False).close()
    sql("DROP TABLE perqueue_settled CASCADE")
    result = perqueue(*command)
    assert result.exit_code == 1
    assert "Restart the program" in " ".join(result.output.split())
    assert sql("SELECT to_regclass('perqueue_settled')") == [(None,)]
