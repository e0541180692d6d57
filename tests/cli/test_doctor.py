import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from perqueue._activity import checksum
from perqueue.sandbox import BadToken, Refuse
from tests.faults.test_places import read_only_mount
from tests.helpers import Child


@pytest.fixture
def filled(make_queue, per, until):
    """A closed outbox: one delivered, one refused, three pending."""
    queue = make_queue()
    queue.record("GROUP_A", "USER_1").wait()
    per.set_fault(Refuse("unknown activity type"), times=1)
    queue.record("GROUP_A", "USER_2")
    until(lambda: queue.stats().rejected)
    queue.close()
    queue = make_queue(drain=False)
    for n in (3, 4, 5):
        queue.record("GROUP_A", f"USER_{n}")
    queue.close()


@pytest.fixture
def findings(perqueue):
    """Run doctor, and return exit code and findings by what they are about."""

    def run(*arguments):
        result = perqueue("doctor", "--offline", "--json", *arguments)
        return result.exit_code, {each["about"]: each for each in json.loads(result.output)["findings"]}

    return run


def change(path, statement, *values):
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute(statement, values)
        connection.commit()


def test_a_healthy_outbox(filled, findings, perqueue):
    """Nothing is wrong with a sound outbox: exit code 0, and a line for each thing that was looked at."""
    code, found = findings()
    assert code == 0
    assert {each["level"] for each in found.values()} <= {"ok", "warning"}
    assert "`perqueue rejected list`" in found["rejected"]["remedy"]
    assert found.keys() >= {"file", "place", "room", "use", "wal", "outbox", "structure", "rows", "books"}
    lines = perqueue("doctor", "--offline").output.splitlines()
    assert sum(line.startswith(("  ok ", "  warning ")) for line in lines) == len(found)
    remedies = [each["remedy"] for each in found.values() if each["remedy"]]
    assert sum(line.lstrip().startswith("-> ") for line in lines) == len(remedies)


def test_looking_changes_nothing(filled, outbox, perqueue, env, tmp_path):
    """Doctor leaves file and write-ahead log as they are, byte for byte."""
    with Child(
        "queue = PerQueue(drain=False); queue.record('G', 'U'); say('ready'); hear()", env=env
    ) as child:
        child.expect("ready")
        child.kill()  # so that the -wal stays
    wal = outbox.with_name(f"{outbox.name}-wal")
    before = outbox.read_bytes(), wal.read_bytes()
    assert before[1]
    perqueue("doctor")
    perqueue("doctor", "--salvage", tmp_path / "new.db")
    assert (outbox.read_bytes(), wal.read_bytes()) == before


def test_what_is_damaged_is_named(filled, outbox, findings):
    """A row that is not what was recorded is counted, with what to do."""
    change(outbox, "UPDATE perqueue_activity SET user_id = 'USER_9' WHERE id = 4")
    code, found = findings()
    assert code == 1
    assert found["rows"]["level"] == "problem"
    assert "not what was recorded: 1 of 5 activities" in found["rows"]["text"]


@pytest.mark.parametrize("damage", [2**63 - 1, -(2**63)])
def test_a_damaged_time_hides_nothing(filled, outbox, findings, damage):
    """A time that no calendar has is a damaged row, and neither the clock's fault nor the end of the look."""
    change(outbox, "UPDATE perqueue_activity SET recorded_at = ? WHERE id = 4", damage)
    code, found = findings()
    assert code == 1
    assert found["rows"]["text"].startswith("not what was recorded: 1 of 5 activities")
    assert "3 pending" in found["delivery"]["text"]
    assert not found.keys() & {"contents", "dates"}


def test_a_wrong_outcome_is_named(filled, outbox, findings):
    """An outcome that is not what was stored is counted, with what to do."""
    change(outbox, "UPDATE perqueue_settlement SET transaction_id = 'X' WHERE activity_id = 1")
    code, found = findings()
    assert code == 1
    assert "1 outcome not" in found["rows"]["text"]
    assert "--salvage" in found["rows"]["remedy"]


def test_a_damaged_structure_is_named(filled, outbox, findings, perqueue):
    """A page that is gone is a problem that names the salvage; `status` names doctor."""
    with outbox.open("r+b") as file:
        file.seek(1024)
        file.write(bytes(outbox.stat().st_size - 1024))
    code, found = findings()
    assert code == 1
    problems = [each for each in found.values() if each["level"] == "problem"]
    assert any("--salvage" in each["remedy"] for each in problems)
    result = perqueue("status")
    assert result.exit_code == 1
    assert "perqueue doctor" in result.stderr


def test_counters_that_do_not_agree_are_named(filled, outbox, findings):
    """Counters and tables are compared."""
    change(outbox, "UPDATE perqueue_drain SET accepted = 0")
    code, found = findings()
    assert code == 1
    assert "by the counters 4 are pending, by the tables 3" in found["books"]["text"]


def test_why_nothing_is_delivered(make_queue, per, perqueue, findings):
    """A stored pause is shown with its reason and its remedy, though nobody runs."""
    per.set_fault(BadToken())
    make_queue(drain=False).record("GROUP_A", "USER_1")
    perqueue("drain")
    code, found = findings()
    assert code == 1
    assert "bad token" in found["delivery"]["text"]
    assert "token" in found["delivery"]["remedy"]


def test_a_backlog_that_nobody_delivers_is_named(filled, outbox, findings):
    """If the oldest pending activity is old, doctor says so; one from the future means a wrong clock."""
    with closing(sqlite3.connect(outbox)) as connection:
        query = "SELECT recorded_at, activity_type_id FROM perqueue_activity WHERE id = 3"
        now, kind = connection.execute(query).fetchone()
    for number, at in ((3, now - 3_600_000), (4, now + 3_600_000)):
        check = checksum("GROUP_A", f"USER_{number}", kind, at)
        update = "UPDATE perqueue_activity SET recorded_at = ?, checksum = ? WHERE id = ?"
        change(outbox, update, at, check, number)
    _, found = findings()
    assert "perqueue drain" in found["delivery"]["remedy"]
    assert found["dates"]["level"] == "problem"


def test_a_file_that_others_can_open_is_named(filled, outbox, findings):
    """Any mode beyond the owner's is a problem, with the command that mends it."""
    outbox.chmod(0o644)
    code, found = findings()
    assert code == 1
    assert found["file"]["remedy"] == f"chmod 600 {outbox}"


def test_no_outbox_is_misuse(perqueue, tmp_path):
    """Exit code 2 where there is nothing to look at."""
    result = perqueue("doctor", "--outbox", tmp_path / "none.db")
    assert result.exit_code == 2


def test_a_file_that_is_no_outbox_is_left_alone(perqueue, outbox):
    """A text file is a problem, not a crash, and stays as it is."""
    outbox.write_text("these are my notes\n" * 100)
    before = outbox.read_bytes()
    assert perqueue("doctor").exit_code == 1
    assert outbox.read_bytes() == before


@pytest.mark.usefixtures("filled")
def test_salvage_of_a_sound_file_is_the_same_outbox(outbox, perqueue, make_queue, arrived, tmp_path):
    """The new file has every activity with its state, number and history, is its owner's, and goes on."""
    new = tmp_path / "new.db"
    result = perqueue("doctor", "--salvage", new, "--json")
    assert result.exit_code == 0
    saved = json.loads(result.output)
    counts = {name: saved[name] for name in ("pending", "accepted", "rejected", "damaged", "missing")}
    assert counts == {"pending": 3, "accepted": 1, "rejected": 1, "damaged": 0, "missing": 0}
    assert new.stat().st_mode & 0o777 == 0o600
    query = "SELECT * FROM perqueue_activity_log ORDER BY id"
    with closing(sqlite3.connect(outbox)) as old, closing(sqlite3.connect(new)) as reader:
        assert reader.execute(query).fetchall() == old.execute(query).fetchall()
        attempts = "SELECT activity_id, reason FROM perqueue_attempt"
        assert reader.execute(attempts).fetchall() == old.execute(attempts).fetchall()
        identity = "SELECT outbox_id FROM perqueue_outbox"
        assert reader.execute(identity).fetchone() != old.execute(identity).fetchone()
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    queue = make_queue(new)
    assert queue.record("GROUP_A", "USER_6").id == 6
    queue.flush(15)
    assert {user for _, user in arrived()} == {f"USER_{n}" for n in (1, 3, 4, 5, 6)}
    queue.close()
    assert perqueue("doctor", "--outbox", new).exit_code == 0


@pytest.mark.usefixtures("filled")
def test_a_damaged_origin_can_be_given_anew(outbox, perqueue, make_queue, tmp_path, per):
    """What the new file belongs to is what the old one says, or --base-url."""
    change(outbox, "UPDATE perqueue_outbox SET origin = 'https://api.usepfr.com'")
    result = perqueue("doctor", "--salvage", tmp_path / "1.db")
    assert "origin     https://api.usepfr.com\n" in result.output
    perqueue("doctor", "--salvage", tmp_path / "2.db", "--base-url", f"{per.url}/")
    make_queue(tmp_path / "2.db").flush(15)
    assert perqueue("doctor", "--base-url", per.url).exit_code == 2


def test_salvage_says_what_comes_next(filled, outbox, perqueue, tmp_path):
    """The counts are printed, and where the program must be pointed."""
    change(outbox, "UPDATE perqueue_activity SET user_id = 'USER_9' WHERE id = 4")
    new = tmp_path / "new.db"
    output = perqueue("doctor", "--salvage", new).output
    assert "damaged    1" in output
    assert f"PERQUEUE_OUTBOX (or the program's option) to {new}" in output
    with closing(sqlite3.connect(new)) as reader:
        states = reader.execute("SELECT id, state FROM perqueue_activity_log ORDER BY id").fetchall()
    assert states == [(1, "accepted"), (2, "rejected"), (3, "pending"), (4, "damaged"), (5, "pending")]


def test_salvage_overwrites_nothing(filled, perqueue, tmp_path):
    """A salvage into a file that exists is refused."""
    new = tmp_path / "new.db"
    new.write_text("mine")
    result = perqueue("doctor", "--salvage", new)
    assert (result.exit_code, new.read_text()) == (2, "mine")


def test_salvage_waits_for_nobody_to_use_it(filled, outbox, perqueue, env, tmp_path):
    """A salvage of a file that a program has open is refused, and names the process."""
    with Child(
        "queue = PerQueue(drain=False); queue.record('G', 'U'); say('ready'); hear()", env=env
    ) as child:
        child.expect("ready")
        result = perqueue("doctor", "--salvage", tmp_path / "new.db")
        assert result.exit_code == 1
        assert f"process {child.pid} uses" in result.stderr
        assert f"open in process {child.pid}" in perqueue("doctor").output
    assert not (tmp_path / "new.db").exists()
    assert perqueue("doctor", "--salvage", tmp_path / "new.db").exit_code == 0


@pytest.mark.parametrize("counters", ["whole", "lost"])
def test_what_nobody_knows_to_be_delivered_is_missing(make_queue, outbox, perqueue, tmp_path, counters):
    """Activities of which nothing can be read are missing, and named, not taken for delivered ones."""
    queue = make_queue(drain=False)
    for n in range(200):
        queue.record("GROUP_A", f"USER_{n}")
    queue.close()
    if counters == "lost":
        change(outbox, "DELETE FROM perqueue_drain")
    change(outbox, "DELETE FROM perqueue_activity WHERE id <= 120")
    result = perqueue("doctor", "--salvage", tmp_path / "new.db")
    told = set(result.output.splitlines())
    assert {"pending    80", "accepted   0", "missing    120", "Nothing could be read of: 1-120"} <= told
    assert ("counters could not be read" in result.output) == (counters == "lost")
    result = perqueue("doctor", "--outbox", tmp_path / "new.db")
    assert result.exit_code == 1
    assert "120 missing" in " ".join(result.output.split())


@pytest.mark.usefixtures("filled")
def test_a_refusal_without_its_activity_is_damaged(outbox, findings, perqueue, make_queue, tmp_path):
    """A refused activity whose row is lost is named, not requeued, and counted as damaged by a salvage."""
    change(outbox, "DELETE FROM perqueue_activity WHERE id = 2")
    code, found = findings()
    assert code == 1
    assert "1 pending or rejected activity without a row" in found["rows"]["text"]
    assert perqueue("rejected", "requeue", "--all").output == "requeued 0 activities\n"
    new = tmp_path / "new.db"
    saved = json.loads(perqueue("doctor", "--salvage", new, "--json").output)
    assert (saved["rejected"], saved["damaged"], saved["missing"], saved["pending"]) == (0, 1, 0, 3)
    make_queue(new).flush(15)


def test_an_outcome_without_its_activity_stays(filled, outbox, perqueue, tmp_path):
    """A delivered activity whose row is lost stays delivered, and is told."""
    change(outbox, "DELETE FROM perqueue_activity WHERE id = 1")
    result = perqueue("doctor", "--salvage", tmp_path / "new.db")
    assert "accepted   1\n" in result.output
    assert "Of 1 accepted or discarded ones only the outcome could be read." in result.output
    assert "nothing but the outcome is left" in perqueue("doctor", "--outbox", tmp_path / "new.db").output


def test_a_number_far_from_its_neighbours_is_not_believed(filled, outbox, perqueue, tmp_path):
    """A number that leaves out more than was ever deleted is damaged: its activity gets another one."""
    change(outbox, "UPDATE perqueue_activity SET id = 5005 WHERE id = 5")
    saved = json.loads(perqueue("doctor", "--salvage", tmp_path / "new.db", "--json").output)
    assert (saved["pending"], saved["missing"], saved["renumbered"]) == (3, 0, 1)


@pytest.mark.root
def test_a_salvage_by_root_is_the_owners(filled, outbox, perqueue, tmp_path):
    """Whoever owned the damaged outbox owns the new one, and what lies beside it."""
    os.chown(outbox, 12345, 12346)
    perqueue("doctor", "--salvage", tmp_path / "new.db")
    made = list(tmp_path.glob("new.db*"))
    assert made
    assert {(path.stat().st_uid, path.stat().st_gid) for path in made} == {(12345, 12346)}


@pytest.mark.root
@pytest.mark.parametrize("log", ["with a -wal", "without"])
def test_an_outbox_on_a_read_only_file_system(filled, outbox, perqueue, env, log):
    """Doctor looks at an outbox where nothing can be written, and sees what is in its -wal, too."""
    wal = outbox.with_name(f"{outbox.name}-wal")
    if log == "with a -wal":
        with Child(
            "queue = PerQueue(drain=False); queue.record('G', 'U'); say('ready'); hear()", env=env
        ) as child:
            child.expect("ready")
            child.kill()
    outbox.with_name(f"{outbox.name}-shm").unlink(missing_ok=True)
    many = 6 if wal.exists() and wal.stat().st_size else 5
    assert many == (6 if log == "with a -wal" else 5)
    with read_only_mount(outbox.parent):
        result = perqueue("doctor")
    assert f"{many} activities as recorded" in result.output
    assert "cannot write there" in result.output
    assert result.exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=str)
def test_a_full_standard_output_is_not_the_outbox(filled, env, arguments):
    """If what was found cannot be printed, it is standard output that is blamed, in one line."""
    done = run_into_full(["doctor", *arguments], env)
    assert (done.returncode, done.stderr) == (1, "Error: standard output: No space left on device\n")


def test_a_closed_pipe_ends_it_quietly(filled, start):
    """`perqueue doctor | head -1` says nothing about the outbox that is not so."""
    program = start("doctor")
    program.process.stdout.close()
    assert program.process.wait(20) == 1
    assert program.err.rest() == []


def test_a_salvage_that_cannot_be_printed_is_complete(filled, perqueue, env, tmp_path):
    """If standard output fails after a salvage, the new file is there, and stderr says so."""
    new = tmp_path / "new.db"
    done = run_into_full(["doctor", "--salvage", str(new)], env)
    assert done.returncode == 1
    assert f"{new} is complete" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "pending    3" in perqueue("status", "--outbox", new).output


def test_what_is_no_regular_file(perqueue, tmp_path):
    """A directory, a device or a named pipe is no outbox, and nobody is told to change its mode."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, "/dev/null", "/dev/zero", tmp_path / "fifo"):
        for more in ([], ["--salvage", tmp_path / "new.db"]):
            result = perqueue("doctor", "--outbox", path, *more)
            assert (result.exit_code, result.stdout) == (2, "")
            assert "is not a regular file" in result.stderr


@pytest.mark.parametrize("content", ["bytes", "database", "nothing"])
def test_what_is_no_outbox(perqueue, outbox, tmp_path, content):
    """Of a file that is no outbox it is said, and a salvage that finds nothing fails and leaves nothing."""
    if content == "database":
        change(outbox, "CREATE TABLE notes (note)")
    else:
        outbox.write_bytes(b"perhaps" * 1000 if content == "bytes" else b"")
    result = perqueue("doctor")
    assert result.exit_code == 1
    assert ("file is empty" if content == "nothing" else "not an outbox") in result.output
    before = set(tmp_path.iterdir())
    result = perqueue("doctor", "--salvage", tmp_path / "new.db")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nothing of an outbox" in result.stderr
    assert set(tmp_path.iterdir()) == before


def run_into_full(arguments, env):
    with Path("/dev/full").open("w") as full:
        return subprocess.run(
            [sys.executable, "-m", "perqueue", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, **env},
        )
