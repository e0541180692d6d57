import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from perqueue import __version__
from perqueue.cli import main

_HEAVY = {"httpx", "asyncio", "sqlite_utils", "aiohttp", "rich"}


def _commands(group=main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


@pytest.mark.parametrize("path", [path for path, _ in _commands()], ids=" ".join)
def test_every_command_explains_itself(perqueue, path):
    """Every command's --help says what it does and shows an example that begins with its name."""
    result = perqueue(*path, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"perqueue {' '.join(path)}" in result.output.partition("Examples:")[2]


def test_help_lists_the_commands_in_the_order_of_their_use(perqueue):
    """--help lists every command, the ones that are needed first at the top."""
    listed = perqueue("--help").output.partition("Commands:")[2]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    assert names[:10] == [
        "record", "drain", "status", "report", "history", "reconcile", "rejected", "doctor", "sandbox", "demo"
    ]  # fmt: skip


def test_what_a_command_is_for_is_not_cut_short(perqueue):
    """--help says what each command does in a whole sentence."""
    commands = perqueue("--help").output.partition("Commands:")[2].partition("Other variables:")[0]
    assert commands.count("\n") > 10
    assert "..." not in commands


def test_no_token_can_be_an_argument():
    """No command takes a token as an option or an argument: process lists would show it."""
    parameters = [parameter for _, command in _commands() for parameter in command.params]
    assert parameters
    assert [each.name for each in parameters if "token" in f"{each.name} {each.opts}"] == []


def test_version(perqueue):
    """--version prints the installed version."""
    assert perqueue("--version").output == f"perqueue, version {__version__}\n"


def test_python_dash_m_is_the_same_command():
    """`python -m perqueue` is the command `perqueue`."""
    done = subprocess.run(
        [sys.executable, "-m", "perqueue", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: perqueue [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("arguments", "spared"),
    [
        (["--help"], _HEAVY | {"filelock"}),
        (["status"], _HEAVY),
        (["status", "--check"], _HEAVY),
        (
            ["record", "GROUP_A", "USER_1"],
            _HEAVY | {"filelock"},
        ),
        (["rejected", "list"], _HEAVY),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_loads_only_what_it_needs(make_queue, env, arguments, spared):
    """A command that only looks or records loads no HTTP library, and none loads what it does not need."""
    make_queue(drain=False)
    script = (
        "import json, sys\nfrom perqueue.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert spared & set(json.loads(done.stderr.splitlines()[-1])) == set()


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["nonsense"], {}, "No such command 'nonsense'"),
        (["--nonsense"], {}, "No such option"),
        (["record", "GROUP_A"], {}, "USER_ID"),
        (["record", "GROUP_A", "USER_1"], {"PERQUEUE_OUTBOX": ""}, "PERQUEUE_OUTBOX"),
        (["record", "GROUP_A", "USER_1"], {"PER_ACTIVITY_TYPE_ID": ""}, "PER_ACTIVITY_TYPE_ID"),
        (["record", "GROUP_A", "USER_1"], {"PER_BASE_URL": "http://example.com"}, "https"),
        (["record", "GROUP_A", "USER_1", "--csv"], {}, "--csv"),
        (["record", "GROUP_A", ""], {}, "user_id must not be empty"),
        (["status", "-o", "mysql://somewhere/else"], {}, "a file on disk"),
        (["status"], {}, "there is no outbox at"),
        (["status", "--watch", "--check"], {}, "not both"),
        (["status", "--interval", "1"], {}, "--interval is for --watch"),
        (["status", "--max-age", "5m"], {}, "are for --check"),
        (["status", "--check", "--max-age", "5"], {}, "30s, 5m, 2h or 1d"),
        (["drain"], {}, "there is no outbox at"),
        (["drain"], {"PER_ACTIVITY_TOKEN": ""}, "PER_ACTIVITY_TOKEN is not set"),
        (["drain", "--watch", "--timeout", "3"], {}, "--watch"),
        (["drain", "--timeout", "nan"], {}, "nan is not a number of seconds"),
        (["drain", "--timeout", "inf"], {}, "inf is not a number of seconds"),
        (["history", "--id", str(10**30)], {}, "is not in the range"),
        (["status", "--watch", "--interval", "nan"], {}, "nan is not a number of seconds"),
        (["sandbox", "--latency", "inf"], {}, "inf is not a number of seconds"),
        (["sandbox", "--fault", "rate_limit:per_second=Infinity"], {}, "per_second must be at least"),
        (["report"], {"PER_REPORTING_TOKEN": ""}, "PER_REPORTING_TOKEN is not set"),
        (["report", "--end", "2018-12-01"], {}, "--end needs --start"),
        (["report", "--last", "7d", "--start", "2018-12-01"], {}, "--last"),
        (["report", "--last", "7"], {}, "24h, 7d or 4w"),
        (["report", "--start", "yesterday"], {}, "ISO 8601"),
        (["statsu"], {}, "Did you mean 'status'? See '"),
        (["rejected", "requeue"], {}, "--all"),
        (["rejected", "requeue", "1", "--all"], {}, "--all"),
        (["rejected", "requeue", "0"], {}, "0 is not in the range"),
        (["rejected", "requeue", str(10**30)], {}, "is not in the range"),
        (["rejected", "discard", "--all"], {}, "--yes"),
        (["sandbox", "--fault", "nonsense"], {}, "no fault is called"),
        (["sandbox", "--fault", "status:503"], {}, "key=value"),
    ],
    ids=lambda value: (" ".join(value)[:40] or "-") if isinstance(value, list) else (str(value) or None),
)
def test_misuse_is_one_line_and_exit_code_2(perqueue, arguments, environ, says):
    """What is wrong with a command or its configuration is one line on stderr, and exit code 2."""
    result = perqueue(*arguments, **environ)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


def test_a_file_that_is_no_outbox_is_left_alone(perqueue, outbox):
    """A command that is pointed at something else says so, with exit code 2, and changes nothing."""
    outbox.write_text("notes")
    result = perqueue("status")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "not an outbox" in result.stderr
    assert outbox.read_text() == "notes"


@pytest.mark.parametrize("arguments", [["status"], ["status", "--json"], ["--help"]], ids=" ".join)
def test_a_full_standard_output_is_one_line(make_queue, env, arguments):
    """A standard output that takes nothing is named in one line, with exit code 1 and no traceback."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "perqueue", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, **env},
        )
    assert (done.returncode, done.stderr) == (1, "Error: standard output: No space left on device\n")
