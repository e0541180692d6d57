import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from perqueue.sandbox import Refuse, Sandbox, Status

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PATIENCE = 30


@pytest.fixture
def environment(per, tmp_path):
    """What a reader has exported before an example is run."""
    mine = {
        name: value for name, value in os.environ.items() if "PER_" not in name and "PERQUEUE" not in name
    }
    return mine | {
        "PER_BASE_URL": per.url,
        "PER_ACTIVITY_TOKEN": per.activity_token,
        "PER_REPORTING_TOKEN": per.reporting_token,
        "PER_ACTIVITY_TYPE_ID": per.activity_type_id,
        "PERQUEUE_OUTBOX": str(tmp_path / "outbox.db"),
    }


@pytest.fixture
def start(environment, tmp_path):
    """Starts an example, and sees to it that none outlives its test."""
    started = []

    def start(name, *arguments, **more):
        example = subprocess.Popen(
            [sys.executable, "-W", "error", EXAMPLES / name, *arguments],
            env=environment | more,
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(example)
        return example

    yield start
    for example in started:
        example.kill()
        example.communicate(timeout=PATIENCE)


@pytest.fixture
def run(start):
    """Runs an example to its end; returns its exit code, output and errors."""

    def run(name, *arguments, given="", **more):
        example = start(name, *arguments, **more)
        output, errors = example.communicate(given, timeout=PATIENCE)
        return example.returncode, output, errors

    return run


def users(per):
    return {(activity.billing_id, activity.user_id) for activity in per.activities}


def written(tmp_path, text):
    path = tmp_path / "usage.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_example_is_short_and_run_here():
    """An example is read in one go, and each of them is run by a test of this folder, or of the recipes."""
    here = Path(__file__).parent
    files = [*here.glob("test_*.py"), *here.with_name("recipes").glob("test_*.py")]
    tests = "".join(path.read_text(encoding="utf-8") for path in files)
    for example in EXAMPLES.glob("*.py"):
        assert f'"{example.name}"' in tests, f"{example.name} is not run"
        assert len(example.read_text(encoding="utf-8").splitlines()) < 80, f"{example.name} is long"


def test_a_web_handler_counts_its_users(per, start):
    """What users do in a web application arrives at Per, with SIGTERM right after the last request too."""
    web = start("hot_path_web.py", "0")
    url = re.search(r"http://\S+", web.stdout.readline()).group()
    with httpx.Client(trust_env=False, timeout=PATIENCE) as browser:
        for number in range(20):
            assert browser.get(url, params={"group": "GROUP_A", "user": f"USER_{number}"}).status_code == 200
        bad = browser.get(url, params={"group": "GROUP_A"})
        assert (bad.status_code, bad.text) == (400, "user_id must not be empty\n")
    web.send_signal(signal.SIGTERM)
    _, errors = web.communicate(timeout=PATIENCE)
    assert web.returncode == 0, errors
    assert users(per) == {("GROUP_A", f"USER_{number}") for number in range(20)}


def test_a_web_handler_answers_while_per_is_down(per, start, run, tmp_path):
    """An outage costs a web application's users nothing, and what they did is delivered afterwards."""
    per.go_down()
    web = start("hot_path_web.py", "0")
    url = re.search(r"http://\S+", web.stdout.readline()).group()
    with httpx.Client(trust_env=False, timeout=PATIENCE) as browser:
        assert browser.get(url, params={"group": "GROUP_A", "user": "USER_1"}).status_code == 200
    web.kill()
    web.wait(PATIENCE)
    per.come_back()
    assert run("batch_flush.py", written(tmp_path, "billing_id,user_id\n"))[0] == 0
    assert users(per) == {("GROUP_A", "USER_1")}


def test_a_batch_ends_when_per_has_it_all(per, run, tmp_path):
    """A batch script that exits with 0 has delivered every line."""
    lines = "".join(f"GROUP_{number % 3},USER_{number}\n" for number in range(50))
    code, _, errors = run("batch_flush.py", written(tmp_path, f"billing_id,user_id\n{lines}"))
    assert (code, errors) == (0, "")
    assert users(per) == {(f"GROUP_{number % 3}", f"USER_{number}") for number in range(50)}
    assert per.accepted == 50


def test_a_batch_names_the_lines_that_cannot_be_recorded(per, run, tmp_path):
    """A line without a user costs only itself: the others are delivered, and the exit code tells."""
    path = written(tmp_path, "billing_id,user_id\nGROUP_A,USER_1\nGROUP_A,\nGROUP_A,USER_3\n")
    code, _, errors = run("batch_flush.py", path)
    assert code == os.EX_DATAERR
    assert errors == f"{path}, line 3: user_id must not be empty\n"
    assert users(per) == {("GROUP_A", "USER_1"), ("GROUP_A", "USER_3")}


def test_a_batch_tells_what_per_refused(per, run, tmp_path):
    """A batch script names what Per refused, and delivers the rest."""
    per.set_fault(Refuse("unknown_user"), when=lambda activity: activity.user_id == "USER_2")
    path = written(tmp_path, "billing_id,user_id\nGROUP_A,USER_1\nGROUP_A,USER_2\nGROUP_A,USER_3\n")
    code, _, errors = run("batch_flush.py", path)
    assert code == os.EX_DATAERR
    assert "refused: GROUP_A USER_2: unknown_user" in errors
    assert users(per) == {("GROUP_A", "USER_1"), ("GROUP_A", "USER_3")}


def test_a_batch_that_was_too_late_is_delivered_by_the_next(per, run, tmp_path):
    """What an outage keeps from being delivered in time is kept, and the next run delivers it."""
    per.set_fault(Status(503))
    path = written(tmp_path, "billing_id,user_id\nGROUP_A,USER_1\n")
    code, _, errors = run("batch_flush.py", path, "--timeout", "0.5")
    assert code == os.EX_TEMPFAIL
    assert errors.startswith("1 wait in the outbox: ")
    assert per.accepted == 0
    per.clear_faults()
    assert run("batch_flush.py", written(tmp_path, "billing_id,user_id\n"))[0] == 0
    assert users(per) == {("GROUP_A", "USER_1")}


def test_a_batch_stops_at_a_bad_token(per, run, tmp_path):
    """A refused token ends a batch script at once, with a code of its own, and loses nothing."""
    path = written(tmp_path, "billing_id,user_id\nGROUP_A,USER_1\n")
    code, _, errors = run("batch_flush.py", path, PER_ACTIVITY_TOKEN="wrong-token")
    assert code == os.EX_NOPERM
    assert "invalid_auth_token" in errors
    assert "wrong-token" not in errors
    assert run("batch_flush.py", written(tmp_path, "billing_id,user_id\n"))[0] == 0
    assert users(per) == {("GROUP_A", "USER_1")}


def test_a_worker_records_offline_and_delivers_when_it_is_back(per, start, run):
    """What was recorded without a network survives the end of the program and `kill -9`, and arrives."""
    per.go_down()
    code, output, errors = run(
        "offline_worker.py", given="GROUP_A USER_1\nGROUP_B USER_2\n\n", FLUSH_SECONDS="0.2"
    )
    assert code == 0, errors
    assert "started with 0 waiting" in output
    assert "skipped a line: billing_id must not be empty" in output
    assert "2 wait for the next start: " in output

    killed = start("offline_worker.py")
    assert killed.stdout.readline() == "started with 2 waiting\n"
    killed.stdin.write("GROUP_A USER_3\n")
    killed.stdin.flush()
    assert killed.stdout.readline().startswith("recorded ")
    killed.kill()
    killed.wait(PATIENCE)
    assert per.accepted == 0

    per.come_back()
    code, output, errors = run("offline_worker.py", given="GROUP_A USER_4\n")
    assert code == 0, errors
    assert "started with 3 waiting" in output
    assert "Per has it all" in output
    assert users(per) == {
        ("GROUP_A", "USER_1"),
        ("GROUP_B", "USER_2"),
        ("GROUP_A", "USER_3"),
        ("GROUP_A", "USER_4"),
    }


def test_a_worker_delivers_while_it_runs(per, start):
    """A worker whose network comes back delivers what it recorded before, without a restart."""
    per.go_down()
    worker = start("offline_worker.py")
    worker.stdin.write("GROUP_A USER_1\n")
    worker.stdin.flush()
    assert worker.stdout.readline() == "started with 0 waiting\n"
    assert worker.stdout.readline().startswith("recorded ")
    per.come_back()
    per.wait_for(1, timeout=PATIENCE)
    output, errors = worker.communicate(timeout=PATIENCE)
    assert worker.returncode == 0, errors
    assert output.endswith("Per has it all\n")


def test_a_worker_takes_over_from_one_that_died(per, start):
    """Two workers share an outbox; when the one that delivers is killed, the other delivers for both."""
    per.go_down()
    first = start("offline_worker.py")
    assert first.stdout.readline() == "started with 0 waiting\n"
    first.stdin.write("GROUP_A USER_1\n")
    first.stdin.flush()
    assert first.stdout.readline().startswith("recorded ")
    second = start("offline_worker.py")
    assert second.stdout.readline() == "started with 1 waiting\n"
    second.stdin.write("GROUP_A USER_2\n")
    second.stdin.flush()
    assert second.stdout.readline().startswith("recorded ")
    first.kill()
    first.wait(PATIENCE)
    per.come_back()
    output, errors = second.communicate(timeout=PATIENCE)
    assert (second.returncode, output) == (0, "Per has it all\n"), errors
    assert users(per) == {("GROUP_A", "USER_1"), ("GROUP_A", "USER_2")}


def test_a_usage_report_counts_each_user_once(run, tmp_path):
    """The printed report shows how many different users each billing ID had in the last week."""
    age = timedelta(days=30)
    with Sandbox(clock=lambda: datetime.now(UTC) - age) as per:
        here = {"PER_BASE_URL": per.url}
        old = written(tmp_path, "billing_id,user_id\nGROUP_A,FORMER_USER\n")
        assert run("batch_flush.py", old, **here)[0] == 0
        age = timedelta(0)
        lines = "GROUP_B,USER_1\nGROUP_A,USER_1\nGROUP_A,USER_2\nGROUP_A,USER_1\n"
        recent = written(tmp_path, f"billing_id,user_id\n{lines}")
        assert run("batch_flush.py", recent, **here)[0] == 0
        code, output, errors = run("usage_report.py", **here)
        assert (code, errors) == (0, "")
        assert [line.split() for line in output.splitlines()[1:]] == [
            ["BILLING", "ID", "ACTIVITY", "TYPE", "USERS"],
            ["GROUP_A", per.activity_type_id, "2"],
            ["GROUP_B", per.activity_type_id, "1"],
        ]


def test_a_usage_report_that_cannot_be_had_is_an_error(per, run):
    """No report is no empty table: the reason is printed, and the exit code tells."""
    code, output, errors = run("usage_report.py", PER_REPORTING_TOKEN=per.activity_token)
    assert (code, output) == (1, "")
    assert errors.startswith("no report: Per refused the reporting token")
    assert per.activity_token not in errors
