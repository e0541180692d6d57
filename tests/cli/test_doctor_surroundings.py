"""What `perqueue doctor` finds around the file: who uses it, where it lies, what the environment says."""

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from perqueue import PerQueue
from perqueue._lock import drain_lock, is_drained
from perqueue.cli._checks.machine import sqlite as judge_sqlite
from perqueue.cli._checks.visit import visit
from perqueue.sandbox import Refuse
from tests.cli._terminal import Terminal
from tests.faults._disks import mounted
from tests.faults.test_places import powerless
from tests.helpers import Child, environment, until

ROOT = Path(__file__).parents[2]
DRAIN = "queue = PerQueue(); queue.record('G', 'U').wait(); say('ready'); hear()"
RECORD = "queue = PerQueue(drain=False); queue.record('G', 'U'); say('ready'); hear()"


@pytest.fixture
def findings(perqueue):
    """Run doctor offline; return exit code and lists of findings by what they are about."""

    def run(*arguments, **more):
        result = perqueue("doctor", "--offline", "--json", *arguments, **more)
        found = {}
        for each in json.loads(result.stdout)["findings"]:
            found.setdefault(each["about"], []).append(each)
        return result.exit_code, found

    return run


@pytest.fixture
def stored(make_queue, outbox):
    """Make an outbox with three pending activities."""
    queue = make_queue(drain=False)
    for user in ("USER_1", "USER_2", "USER_3"):
        queue.record("GROUP_A", user)
    queue.close()
    return outbox


def change(path, statement, *values):
    with closing(sqlite3.connect(path, timeout=5)) as connection, connection:
        connection.execute(statement, values)


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def visited(path, now, **environ):
    """Return all findings of a look at a given time, without asking Per."""
    return [each for _, group in visit(path, environ, now, None) for each in group]


# --- Programs


def test_who_delivers_and_a_frozen_one(findings, outbox, per):
    """Who delivers is named with its start; frozen, it is a problem that names how to thaw it."""
    with Child(DRAIN, env=environment(outbox, per), measured=False) as child:
        child.expect("ready")
        _, found = findings()
        (drainer,) = found["drainer"]
        assert re.fullmatch(rf"process {child.pid} \(python\S*, since 20.*\) delivers", drainer["text"])
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: state_of(child.pid) == "T", "the child is frozen")
        code, found = findings()
        (drainer,) = found["drainer"]
        assert (code, drainer["level"]) == (1, "problem")
        assert "frozen" in drainer["text"]
        assert f"`kill -CONT {child.pid}`" in drainer["remedy"]
        os.kill(child.pid, signal.SIGCONT)
        until(lambda: state_of(child.pid) != "T", "the child goes on")
        assert findings()[0] == 0


def test_a_frozen_one_that_records(findings, outbox, per):
    """A frozen process that has the outbox open is a warning: it may hold the write lock."""
    with Child(RECORD, env=environment(outbox, per), measured=False) as child:
        child.expect("ready")
        os.kill(child.pid, signal.SIGSTOP)
        until(lambda: state_of(child.pid) == "T", "the child is frozen")
        code, found = findings()
        assert (code, found["use"][0]["level"]) == (0, "warning")
        assert f"process {child.pid} " in found["use"][0]["text"]


# --- Place


@pytest.mark.parametrize(
    ("mode", "says"), [(0o700, "ok"), (0o755, "ok"), (0o1777, "warning"), (0o777, "problem")], ids=str
)
def test_a_folder_that_anybody_may_write(findings, stored, mode, says):
    """A folder where anybody can replace the outbox is a problem, one where they can add files a warning."""
    stored.parent.chmod(mode)
    code, found = findings()
    assert (found["folder"][0]["level"], code) == (says, 1 if says == "problem" else 0)


@pytest.mark.root
def test_a_lock_file_of_another_user(findings, stored):
    """A file beside the outbox that its owner cannot open is a problem, with the command that mends it."""
    beside = stored.with_name(f"{stored.name}-drain.lock")
    beside.touch(0o600)
    os.chown(beside, 12345, 12345)
    code, found = findings()
    assert code == 1
    assert f"{beside.name} belongs to 12345" in found["beside"][0]["text"]
    assert found["beside"][0]["remedy"].endswith(f"chown root {beside}")


def test_a_log_that_others_can_read(findings, outbox, per):
    """The write-ahead log holds activities, too: who may open it matters as for the file."""
    with Child(RECORD, env=environment(outbox, per)) as child:
        child.expect("ready")
        child.kill()
    wal = outbox.with_name(f"{outbox.name}-wal")
    wal.chmod(0o644)
    code, found = findings()
    assert code == 1
    assert found["beside"][0]["remedy"] == f"chmod 600 {wal}"


@pytest.mark.root
def test_memory_and_no_room_for_files(perqueue, tmp_path):
    """A file system in memory is a warning, one that takes no more files a problem."""
    with mounted(tmp_path / "m", "-t", "tmpfs", "-o", "size=100m,nr_inodes=60", "tmpfs") as folder:
        path = folder / "a.db"
        PerQueue(path, drain=False).close()
        result = perqueue("doctor", "--offline", "--outbox", path)
    assert result.exit_code == 1
    assert re.search(r"warning +place +it lies in memory", result.output)
    assert re.search(r"problem +room .* files only \(inodes\)", result.output)


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o700, 0o755], ids=["a closed folder", "a closed file"])
def test_who_may_not_look_is_told_so(stored, env, mode):
    """Where this user may not read, doctor ends with exit code 2 and one line, whatever it has shown."""
    os.chown(stored, 12345, 12345)
    os.chown(stored.parent, 12345, 12345)
    stored.parent.chmod(mode)
    command = [*powerless(), sys.executable, "-m", "perqueue", "doctor", "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 2
    assert done.stderr.startswith(f"Error: cannot look at {stored}: ")
    assert done.stderr.count("\n") == 1


# --- Contents


@pytest.mark.parametrize(
    ("age", "answered", "says", "words"),
    [
        (10_000, None, "ok", "none of Per's answers"),
        (3_600_000, 5_000, "warning", "it is being delivered"),
        (3_600_000, 3_000_000, "problem", "nothing moves"),
        (3_600_000, None, "problem", "nothing moves"),
    ],
)
def test_a_backlog_that_somebody_delivers(stored, age, answered, says, words):
    """What waits for long is a problem only if Per's answers have ceased as well."""
    with closing(sqlite3.connect(stored)) as reader:
        (now,) = reader.execute("SELECT max(recorded_at) FROM perqueue_activity").fetchone()
    change(stored, "UPDATE perqueue_activity SET recorded_at = ? WHERE id = 2", now - age)
    if answered is not None:
        change(
            stored,
            "INSERT INTO perqueue_settlement VALUES (1, 1, ?, 5, 1, 'T', NULL, NULL, 0)",
            now - answered,
        )
    with drain_lock(stored):
        assert is_drained(stored)
        (delivery,) = [each for each in visited(stored, now) if each.about == "delivery"]
    assert delivery.level == says
    assert words in delivery.text


def test_the_end_of_the_month(stored):
    """In the last day of a month something pending is a warning; on another day, or delivered, it is not."""
    eve = int(datetime(2018, 11, 30, 23, tzinfo=UTC).timestamp() * 1000)
    (warning,) = [each for each in visited(stored, eve) if each.about == "month end"]
    assert "2018-12-01 00:00 UTC" in warning.text
    assert not [each for each in visited(stored, eve - 86_400_000) if each.about == "month end"]


def test_refusals_by_reason(findings, make_queue, per, until):
    """The commonest reasons of refusals are named with their numbers, the rest counted."""
    queue = make_queue()
    for reason, times in (("one", 1), ("two", 2), ("three", 3), ("uno", 1)):
        per.set_fault(Refuse(reason), times=times)
        for number in range(times):
            queue.record("GROUP_A", f"{reason}-{number}")
        until(lambda: queue.stats().pending == 0)
    queue.close()
    _, found = findings()
    text = "Per refused 7 activities: 3 for 'three', 2 for 'two', 1 for 'one' and 1 more reason"
    assert [each["text"] for each in found["rejected"]] == [text]


def test_an_older_schema_is_no_trouble(findings, stored):
    """A file of an older perqueue can be looked at as it is, and stays as it is."""
    change(stored, "ALTER TABLE perqueue_drain DROP COLUMN trail_lost_through")
    change(stored, "UPDATE perqueue_outbox SET schema_version = 1")
    before = stored.read_bytes()
    code, found = findings()
    assert code == 0
    assert "the next program that opens it brings it to schema" in found["outbox"][0]["text"]
    assert stored.read_bytes() == before


def test_how_far_the_trail_goes_back(findings, stored):
    """Once settled activities were deleted, doctor says up to when, for who wants to reconcile."""
    assert "trail" not in findings()[1]
    change(stored, "UPDATE perqueue_drain SET trail_lost_through = 1543622400000")
    (trail,) = findings()[1]["trail"]
    assert "2018-12-01 00:00:00 UTC were deleted" in trail["text"]


def test_a_damaged_file_is_rescued_as_doctor_says(stored, perqueue, per, arrived):
    """Its own words lead from a damaged file to a new one, with everything that can be read, delivered."""
    change(stored, "UPDATE perqueue_drain SET accepted = 2")
    shown = perqueue("doctor", "--offline")
    assert shown.exit_code == 1
    steps = re.findall(r"^  \d\. (.*)$", shown.output, re.MULTILINE)
    assert steps[0] == "Stop the programs that use it."
    assert perqueue(*shlex.split(steps[1])[1:]).exit_code == 0
    new = re.search(r"PERQUEUE_OUTBOX=(\S+),", steps[2])[1]
    assert perqueue("drain", PERQUEUE_OUTBOX=new).exit_code == 0
    assert {user for _, user in arrived()} == {"USER_1", "USER_2", "USER_3"}
    assert perqueue("doctor", PERQUEUE_OUTBOX=new, PER_REPORTING_TOKEN="").exit_code == 0


# --- Machine


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ((3, 36, 0), "problem"), ((3, 37, 0), "warning"), ((3, 44, 5), "warning"), ((3, 44, 6), "ok"),
        ((3, 45, 0), "warning"), ((3, 50, 6), "warning"), ((3, 50, 7), "ok"), ((3, 51, 2), "warning"),
        ((3, 51, 3), "ok"), ((3, 53, 0), "ok"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else value,
)  # fmt: skip
def test_versions_of_sqlite(version, says):
    """Versions with the WAL-reset bug are named, mended ones are not, too old ones are a problem."""
    assert judge_sqlite(version, 3).level == says


def test_sqlite_without_threads():
    """A SQLite that must not be used from several threads is a problem."""
    assert judge_sqlite((3, 53, 0), 0).level == "problem"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"PERQUEUE_DRAIN": "maybe"}, "PERQUEUE_DRAIN"),
        ({"PERQUEUE_DRAIN": ""}, "PERQUEUE_DRAIN"),
        ({"PER_BASE_URL": "http://example.com"}, "PER_BASE_URL"),
        ({"PER_ACTIVITY_TYPE_ID": "x" * 401}, "PER_ACTIVITY_TYPE_ID"),
        ({"ACTIVITY_TYPE_ID": "\udcff"}, "ACTIVITY_TYPE_ID"),
        ({"PERQUEUE_OUTBOX": "mysql://db/app"}, "PERQUEUE_OUTBOX"),
    ],
    ids=str,
)
def test_variables_that_programs_would_refuse(stored, given, words):
    """Each malformed variable is a problem with its name, and no look at the rest is lost by it."""
    found = visited(stored, 0, **given)
    (wrong,) = [each for each in found if each.about == "variables"]
    assert wrong.level == "problem"
    assert wrong.text.startswith(f"{words}: ")
    assert [each for each in found if each.about == "reporting"]


# --- On a terminal


def on_a_terminal(columns, env):
    """Return what doctor prints on a terminal so wide."""
    with Terminal(["-m", "perqueue", "doctor", "--offline"], env, columns) as terminal:
        terminal.end()
        return terminal.output


def test_on_a_terminal_it_keeps_to_its_width_and_to_no_color(stored, env):
    """At 80 columns no line is longer, save for a path; colours come on a terminal, not with NO_COLOR."""
    stored.chmod(0o644)
    plain = on_a_terminal(80, {**env, "NO_COLOR": "1"})
    assert "\x1b" not in plain
    assert [line for line in plain.splitlines() if len(line) > 80 and str(stored.parent) not in line] == []
    assert f"\n{'':<22}-> chmod 600\n" in plain
    coloured = on_a_terminal(80, env)
    assert "\x1b[31mproblem" in coloured
    colourless, again = re.sub(r"\x1b\[\d*m", "", coloured), on_a_terminal(80, {**env, "NO_COLOR": "1"})
    # What is free, and how long a look takes, changes from one to the next.
    assert re.sub(r"[\d.]+", "0", colourless) == re.sub(r"[\d.]+", "0", again)


def test_every_line_is_explained():
    """`docs/doctor.md` has a row for each thing that a finding can be about."""
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "perqueue/cli/_checks").glob("*.py"), *(ROOT / "perqueue/_outbox").rglob("*.py")]
    said = [re.findall(r'\b(?:ok|warning|problem)\(\s*"([a-z ]+)"', each.read_text()) for each in sources]
    abouts = {about for some in said for about in some}
    assert len(abouts) >= 29
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    assert {about for about in abouts if not any(f"`{about}`" in row for row in rows)} == set()
