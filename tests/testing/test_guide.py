"""`docs/testing.md` is a promise: its tests pass in a fresh project, and fail if the application forgets."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "testing.md").read_text(encoding="utf-8")
FILE = re.compile(r"^```(?:python|ini)\n# (\S+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def project(title):
    """Return the files of a section: name -> content."""
    [text] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", GUIDE, re.DOTALL | re.MULTILINE)
    return dict(FILE.findall(text))


@pytest.fixture
def stranger(tmp_path):
    """Run pytest in a folder of its own, as somebody who has installed perqueue; return code and output."""

    def run(files, *arguments):
        for name, text in files.items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        # No plugin but ours and anyio's: the plugins of this project's own tests are not the stranger's.
        foreign = ["cov", "hypothesispytest", "timeout", "playwright", "base_url", "sybil"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *arguments]
        for name in foreign:
            command += ["-p", f"no:{name}"]
        unwanted = ("PER_", "PERQUEUE_", "PYTEST", "COVERAGE_", "COV_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


TITLES = [title for title in re.findall(r"^## (.*)", GUIDE, re.MULTILINE) if project(title)]


@pytest.mark.parametrize("whole_run", [False, True], ids=["fixtures", "whole run"])
def test_the_projects_of_the_guide_pass(stranger, whole_run):
    """The files that the guide shows are projects whose tests pass, all of them."""
    projects = [files for files in map(project, TITLES) if ("pytest.ini" in files) == whole_run]
    files = {name: text for each in projects for name, text in each.items()}
    wanted = sum(text.count("def test_") for text in files.values())
    code, output = stranger(files, "-q")
    assert code == 0, output
    assert wanted >= (2 if whole_run else 9)
    assert re.search(rf"^{wanted} passed in", output, re.MULTILINE), output


def test_an_application_that_forgets_to_record_fails_its_tests(stranger):
    """In a fresh project outside of the repository, a test fails when the application records nothing."""
    files = project("The first test")
    files["exports.py"] = files["exports.py"].replace("queue.record(", "dict(")
    code, output = stranger(files, "-q")
    assert code == 1, output
    assert "expected 1 recorded with billing_id='ACME', user_id='USER_1', found 0" in output
    assert "nothing was recorded" in output
    assert "1 failed" in output
    assert "perqueue/testing.py:" not in output  # the failing line is the test's


def test_a_wrong_user_is_shown_as_in_the_guide(stranger):
    """The failure that the guide shows is the one that appears."""
    files = project("The first test")
    files["exports.py"] = files["exports.py"].replace("user_id=user", 'user_id="USER_2"')
    code, output = stranger(files, "-q")
    assert code == 1, output
    [shown] = re.findall(r"^```text\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
    printed = [line.removeprefix("E").strip() for line in output.splitlines()]
    for line in shown.splitlines():
        assert re.sub("pending|accepted", "", line.strip()) in [
            re.sub("pending|accepted", "", each) for each in printed
        ], output


def test_workers_of_xdist_share_nothing(stranger, tmp_path):
    """In parallel workers each test has its own Per and outbox, for one test and for the whole run."""
    tests = """
import os
import pytest
from perqueue import PerQueue
from perqueue.testing import assert_recorded
queue = PerQueue()

@pytest.mark.parametrize("n", range(6))
def test_fixture(per_queue, per_sandbox, n):
    per_queue.record("ACME", "USER")
    per_queue.flush()
    assert per_sandbox.accepted == 1

@pytest.mark.parametrize("n", range(6))
def test_run(per_sandbox, n):
    queue.record("ACME", "USER")
    queue.flush()
    assert per_sandbox.accepted == 1
    assert_recorded(times=1)
    with open("outboxes", "a") as file:
        file.write(os.environ["PERQUEUE_OUTBOX"] + "\\n")
"""
    files = {"test_parallel.py": tests, "pytest.ini": "[pytest]\nper_environment = true\n"}
    code, output = stranger(files, "-q", "-n2")
    assert code == 0, output
    assert "12 passed" in output
    assert len(set((tmp_path / "outboxes").read_text().split())) == 2


def test_the_plugin_costs_nothing_until_it_is_used(stranger):
    """A run that uses no fixture imports neither perqueue nor what the local Per is made of."""
    test = """
import sys
def test_nothing():
    assert {"perqueue", "aiohttp", "httpx"} & sys.modules.keys() == set()
"""
    code, output = stranger({"test_nothing.py": test}, "-q", "-p", "no:anyio", "-p", "no:xdist")
    assert code == 0, output


def test_a_missing_extra_is_named(stranger):
    """Without aiohttp the first test that asks for a fixture fails, and says what to install."""
    files = project("The first test") | {"conftest.py": "import sys\nsys.modules['aiohttp'] = None\n"}
    files["test_exports.py"] = files["test_exports.py"].replace("from perqueue.testing import", "# ")
    code, output = stranger(files, "-q")
    assert code == 1, output
    assert "install useper-perqueue[sandbox]" in output
