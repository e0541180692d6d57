"""README.md is a promise too: its Python runs, and its tables are complete."""

import inspect
import logging
import re
import shutil
import subprocess
import sysconfig
from dataclasses import fields
from pathlib import Path

import click
import pytest

import perqueue
from perqueue import ActivityRejected, DrainState, PerQueue, PerQueueError, RetryPolicy, Stats
from perqueue.cli import main
from perqueue.sandbox import BadToken, Redirect, Refuse, Sandbox, Status
from tests.pages import ROOT, Page, words

README = Page(ROOT / "README.md")
TEXT = README.text
OPERATIONS = Page(ROOT / "docs" / "operations.md")


def section(title):
    return re.search(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE).group(1)


def named(title, column=0):
    """Returns the names in backticks in a column of the section's table."""
    rows = [line.split("|")[1:-1] for line in section(title).splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row[column])]


@pytest.fixture
def _home(tmp_path, monkeypatch):
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _equipped(_home, options, monkeypatch):
    """What the README's reader has: tokens and an activity type in the environment."""
    for name, value in options.items():
        monkeypatch.setenv(f"PER_{name.upper()}", value)


@pytest.mark.parametrize("block", README.python(), ids=lambda block: f"line {block.line}")
@pytest.mark.usefixtures("_equipped")
def test_python_in_the_readme_runs(block):
    """Every Python block runs by itself, given a queue and an environment that is set up."""
    with PerQueue("activities.db") as queue:
        block.document.namespace.clear()
        block.document.namespace["queue"] = queue
        block.evaluate()


@pytest.mark.usefixtures("_home")
def test_the_first_example_needs_nothing_and_counts_two_users(capsys):
    """The example that a stranger meets first runs without an account, twice too, and prints 2."""
    first = README.python()[0]
    for _ in range(2):
        first.document.namespace.clear()
        Path("try.db").unlink(missing_ok=True)  # here every sandbox has another port, so another origin
        first.evaluate()
    assert capsys.readouterr().out == "2\n2\n"


@pytest.mark.usefixtures("_equipped")
def test_the_node_wrappers_calls_are_answered_in_the_same_way(per):
    """What the Node.js wrapper's users do, adding an activity and asking for a report, arrives at Per."""
    [block] = [block for block in README.python() if "add_activity" in block.parsed]
    block.document.namespace.clear()
    block.evaluate()
    [activity] = per.activities
    assert block.document.namespace["transaction_id"] == activity.transaction_id
    assert block.document.namespace["report"].unique("GROUP_A") == 1


@pytest.mark.parametrize("command", [line for line in README.commands() if line.startswith("make ")])
def test_make_targets_in_the_readme_exist(command):
    """Every `make …` of the README is a target, and described in `make help`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{words(command)[1]}:.*## ", makefile, re.MULTILINE)


def test_the_first_two_commands_are_the_demo_and_the_tests():
    """Who only tries two commands has seen the demonstration and the tests."""
    assert [words(command) for command in README.commands()[:2]] == [["make", "demo"], ["make", "test"]]


def test_the_readme_shows_every_command():
    """No command is left out of the README."""

    def leaves(command, path):
        if isinstance(command, click.Group):
            return [leaf for name, each in command.commands.items() for leaf in leaves(each, (*path, name))]
        return [" ".join(path)]

    shown = section("The command line")
    assert [path for path in leaves(main, ("perqueue",)) if path not in shown] == []


@pytest.mark.usefixtures("_equipped")
def test_the_outbox_can_be_read_as_the_readme_says(per):
    """The README's sqlite-utils commands work on an outbox, and show what was recorded and accepted."""
    with PerQueue("activities.db") as queue:
        queue.record("GROUP_A", "USER_1")
    tool = shutil.which("sqlite-utils", path=sysconfig.get_path("scripts"))
    asked = [[tool, *words(line)[1:]] for line in README.commands() if line.startswith("sqlite-utils ")]
    shown = [subprocess.check_output(command, text=True, timeout=60) for command in asked]
    assert len(shown) == 2
    assert all("accepted" in table for table in shown)
    assert per.activities[0].transaction_id in shown[0]


def test_a_wrong_activity_type_is_repaired_as_the_readme_says(tmp_path, options):
    """Corrected in the program, the right type is delivered at once, and the rest can be requeued with it."""
    outbox, right = tmp_path / "activities.db", options.pop("activity_type_id")
    with Sandbox(activity_types=[right]) as per:
        options["base_url"] = per.url
        queue = PerQueue(outbox, activity_type_id="WRONG", **options)
        for number in range(60):
            queue.record("GROUP_A", f"USER_{number}")
        with pytest.raises(ActivityRejected, match="every activity"):
            queue.flush()
        assert (queue.stats().pending, queue.stats().state) == (60, "paused")
        queue.close()

        with PerQueue(outbox, activity_type_id=right, **options) as queue:
            for number in range(60, 65):
                queue.record("GROUP_A", f"USER_{number}")
            with pytest.raises(ActivityRejected, match="60 of the activities"):
                queue.flush()
            assert (per.unique("GROUP_A"), queue.stats().pending, queue.stats().rejected) == (5, 0, 60)

            [line] = [line for line in OPERATIONS.commands() if "requeue --all --activity-type" in line]
            arguments = [right if word == "ACTIVITY_TYPE_ID" else word for word in words(line)[1:]]
            main([*arguments, "--outbox", str(outbox)], standalone_mode=False)
            queue.flush()
            assert (per.unique("GROUP_A"), queue.stats().rejected) == (65, 0)


def test_no_log_shows_a_token_or_an_id(per, make_queue, outbox, caplog):
    """Through an outage, a refusal and a bad token, logs up to INFO hold neither; the file holds no token."""
    caplog.set_level(logging.INFO)
    queue = make_queue(on_rejected=lambda _: None)
    for fault in (Status(503), Redirect(), Refuse("unknown user SECRET_USER of SECRET_GROUP"), BadToken()):
        per.set_fault(fault)
        queue.record("SECRET_GROUP", "SECRET_USER")
        with pytest.raises(PerQueueError) as told:
            queue.flush(timeout=1)
        assert per.activity_token not in f"{told.value} {told.value!r}"
    stored = b"".join(path.read_bytes() for path in outbox.parent.glob(f"{outbox.name}*"))
    assert b"SECRET_USER" in stored
    assert per.activity_token.encode() not in stored
    assert caplog.records
    assert not re.search(f"SECRET_|{per.activity_token}", caplog.text)


def test_the_table_of_options_is_complete():
    """The README lists every option of `PerQueue` that can be used, once."""
    options = inspect.signature(PerQueue).parameters
    assert sorted(named("Options")) == sorted(options)


def test_the_defaults_in_the_table_of_options_are_right():
    """A default that the README gives is the default."""
    parameters = inspect.signature(PerQueue).parameters
    table = dict(re.findall(r"^\| `(\w+)` \| .*?\| (.*) \|$", section("Options"), re.MULTILINE))
    for name in ("max_in_flight", "max_pending", "flush_timeout", "exit_timeout", "request_timeout"):
        assert f"`{parameters[name].default}`" in table[name].replace("_000", "000"), name
    assert f"`{parameters['stalled_after'].default}`" in section("Options")
    [policy] = re.findall(r"`RetryPolicy\((.*?)\)`", table["retry"])
    given = dict(part.split("=") for part in policy.split(", "))
    assert {name: float(value) for name, value in given.items()} == {
        field.name: getattr(RetryPolicy(), field.name) for field in fields(RetryPolicy)
    }


def test_the_table_of_exceptions_is_complete():
    """The README lists every exception, once."""
    public = [getattr(perqueue, name) for name in perqueue.__all__]
    exceptions = [each.__name__ for each in public if isinstance(each, type) and issubclass(each, Exception)]
    assert sorted(named("Waiting: flush and receipts")) == sorted(exceptions)


def test_the_table_of_states_is_complete():
    """The README explains every state that `stats()` can show, and names every number."""
    states = {str(state) for state in DrainState} - {"closed"}  # a closed queue has no statistics
    assert set(named("Statistics and states")) == states
    numbers = set(re.findall(r"`(\w+)`", section("Statistics and states").split("\n\n")[0]))
    assert {field.name for field in fields(Stats)} <= numbers


def test_the_guide_to_operations_explains_every_state():
    """`docs/operations.md` explains what `status --watch` says, in the words in which it says it."""
    source = (ROOT / "perqueue" / "cli" / "_health.py").read_text(encoding="utf-8")
    said = {words.split(":")[0].strip() for words in re.findall(r'\btext ?= ?f?"([^"{;,]+)', source)} - {""}
    explained = " ".join(re.findall(r"^\| `([^`]+)`", OPERATIONS.text, re.MULTILINE))
    assert len(said) > 8
    assert [words for words in said if " ".join(words.split()[:2]) not in explained] == []


def test_every_test_behind_a_guarantee_exists():
    """Each test that `docs/guarantees.md` names can be found where it says."""
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    tests = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", text)
    assert len(tests) > 80
    missing = [
        f"{path}::{name}"
        for path, name in tests
        if not (file := ROOT / "tests" / path).is_file()
        or f"def {name}" not in file.read_text(encoding="utf-8")
    ]
    assert missing == []


def test_the_readme_stays_readable():
    """The README is shorter than 300 lines, and its first Python stands in the first twenty-five."""
    assert len(TEXT.splitlines()) < 300
    assert "```python" in "\n".join(TEXT.splitlines()[:25])
