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


def test_doctor_is_for_files(perqueue):
    """`doctor` says that a database has tools of its own."""
    result = perqueue("doctor")
    assert result.exit_code == 2
    assert "its own tools" in result.output
