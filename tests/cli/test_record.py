import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def recorded(make_queue):
    """Return what the outbox holds: a list of (number, billing ID, user ID, activity type)."""

    def look():
        claimed = make_queue(drain=False)._outbox.claim(0, 1000)
        return [(each.id, each.billing_id, each.user_id, each.activity_type_id) for each in claimed]

    return look


def test_one_activity(perqueue, recorded):
    """`record` stores one activity without any token, and prints its number."""
    first = perqueue("record", "GROUP_A", "USER_1", PER_ACTIVITY_TOKEN=None)
    second = perqueue("record", "--activity-type", "OTHER", "--", "GROUP_A", "-USER")
    assert (first.output, second.output) == ("1\n", "2\n")
    assert recorded() == [(1, "GROUP_A", "USER_1", "TYPE"), (2, "GROUP_A", "-USER", "OTHER")]


def test_lines_from_standard_input(perqueue, recorded):
    """`record -` stores one activity a line, tab-separated and taken literally, and prints the numbers."""
    result = perqueue("record", "-", stdin='A\t"x"\nB\ty, z\tOTHER\n\nC\tz\t\n')
    assert (result.exit_code, result.output) == (0, "1\n2\n3\n")
    assert recorded() == [(1, "A", '"x"', "TYPE"), (2, "B", "y, z", "OTHER"), (3, "C", "z", "TYPE")]


def test_csv_as_spreadsheets_write_it(perqueue, recorded):
    """`record - --csv` takes quotes, a byte order mark, CRLF and a line of column names as CSV has them."""
    text = '\ufeffbilling_id,user_id,activity_type_id\r\nA,"x, ""y""",\r\nB,z,OTHER\r\n'
    assert perqueue("record", "-", "--csv", stdin=text).exit_code == 0
    assert recorded() == [(1, "A", 'x, "y"', "TYPE"), (2, "B", "z", "OTHER")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"B\n", "line 2: 1 field"),
        (b"B\tc\td\te\n", "line 2: 4 fields"),
        (b"B\t\n", "line 2: user_id must not be empty"),
        (b"B\t\xff\n", "line 2: it is not UTF-8"),
        (b"B\t" + b"x" * 401 + b"\n", "line 2: user_id is 401 UTF-8 bytes long"),
    ],
)
def test_the_first_bad_line_ends_it(perqueue, recorded, line, says):
    """A bad line is named by its number, with exit code 2, and those before it are recorded."""
    result = perqueue("record", "-", stdin=b"A\tx\n" + line + b"C\tz\n")
    assert (result.exit_code, result.stdout) == (2, "1\n")
    assert says in result.stderr
    assert recorded() == [(1, "A", "x", "TYPE")]


def test_a_line_without_a_type_where_none_is_set(perqueue):
    """A line that needs a default activity type says so if there is none."""
    result = perqueue("record", "-", stdin="A\tx\tOTHER\nB\ty\n", PER_ACTIVITY_TYPE_ID="")
    assert (result.exit_code, result.stdout) == (2, "1\n")
    assert "line 2: activity_type_id is missing" in result.stderr


def test_each_number_is_printed_when_its_activity_is_stored(start, recorded):
    """A program that writes lines reads each number as soon as the activity is stored: an acknowledgement."""
    program = start("record", "-")
    for number in (1, 2, 3):
        program.tell(f"GROUP_A\tUSER_{number}")
        assert program.out.next(10) == str(number)
        assert len(recorded()) == number
    program.process.stdin.close()
    assert program.wait() == (0, [], [])


def test_a_full_disk_is_told_in_one_line(perqueue, tmp_path):
    """A failure of the storage is one line and exit code 1."""
    folder = tmp_path / "missing" / "activities.db"
    result = perqueue("record", "-o", folder, "A", "x")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "directory does not exist" in result.stderr


def test_a_full_standard_output_loses_nothing(recorded, env):
    """If a number cannot be printed, one line says that the activity is recorded, with exit code 1."""
    with Path("/dev/full").open("w") as full:
        done = run(["record", "GROUP_A", "USER_1"], env, stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "activity 1 is recorded, but standard output: No space left on device" in done.stderr
    assert len(recorded()) == 1


def test_it_goes_on_recording_when_nobody_reads_the_numbers(start, recorded):
    """All lines are recorded though standard output is closed, and one line says so, with exit code 1."""
    program = start("record", "-")
    program.tell("GROUP_A\tUSER_1")
    assert program.out.next(10) == "1"
    program.process.stdout.close()
    for number in range(2, 300):
        program.tell(f"GROUP_A\tUSER_{number}")
    program.process.stdin.close()
    assert program.process.wait(20) == 1
    (line,) = program.err.rest()
    assert "all recorded (299 activities), but standard output: Broken pipe" in line
    assert len(recorded()) == 299


def test_a_closed_standard_input_is_told(env):
    """`record -` without any standard input says so in one line."""
    done = run(["record", "-"], env, preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard input is closed" in done.stderr


def test_a_standard_input_that_cannot_be_read_is_told(env):
    """An error of standard input is one line that names it."""
    with Path("/dev/null").open("w") as write_only:
        done = run(["record", "-"], env, stdin=write_only)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "line 1: standard input: Bad file descriptor" in done.stderr


def run(arguments, env, **more):
    return subprocess.run(
        [sys.executable, "-m", "perqueue", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **env},
        **more,
    )
