"""Where the output goes: nowhere, to few characters, to no colours; and what an error tells to do."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from perqueue.cli import main
from tests.cli._terminal import Terminal


def run(env, *arguments, redirect="", **more):
    """Run the command by a shell, which can close what Python cannot."""
    line = f'exec "$@" {redirect}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, "-m", "perqueue", *map(str, arguments)],
        env={**os.environ, **env, **more},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
        timeout=30,
    )
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ["record", "GROUP_A", "USER_2"], ["drain"], ["status"], ["history", "--csv"], ["rejected", "list"],
        ["datasette"], ["completion", "bash"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_closed_standard_output_is_no_trouble(make_queue, env, arguments):
    """With standard output closed a command does its work, and says nothing."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    code, _, errors = run(env, *arguments, redirect=">&-")
    assert code == 0
    assert "Traceback" not in errors


def test_a_closed_standard_input_answers_no_question(make_queue, env):
    """`rejected discard` without --yes asks; where nobody can answer, it says so."""
    make_queue(drain=False)
    code, _, errors = run(env, "rejected", "discard", "1", redirect="<&-")
    assert (code, errors.count("\n")) == (2, 1)
    assert "--yes" in errors


def test_a_full_standard_output_of_the_sandbox_is_not_taken_for_a_port_in_use(env):
    """A sandbox that listens, and cannot say so, blames standard output."""
    code, _, errors = run(env, "sandbox", "--port", "0", redirect=">/dev/full")
    assert (code, errors) == (1, "Error: standard output: No space left on device\n")


@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_no_id_commands_a_terminal(make_queue, env, form):
    """On a terminal control characters are shown by their numbers, in CSV and JSON too; letters stay."""
    make_queue(drain=False).record("GROUP_A", "Zoë\x1b[31m\x9b31m\u202e")
    with Terminal(["-m", "perqueue", "history", form], env) as terminal:
        assert terminal.end() == 0
    assert "Zoë" in terminal.output
    assert [c for c in terminal.output if not c.isprintable() and c != "\n"] == []


def test_a_pipe_gets_every_id_as_it_is(make_queue, perqueue):
    """In a pipe an ID comes out of CSV and JSON as it was recorded, whatever characters it has."""
    odd = "Zoë\x1b[31m\x9b31m\u202e\U000e0001"
    make_queue(drain=False).record("GROUP_A", odd)
    assert odd in perqueue("history", "--csv").stdout
    [row] = json.loads(perqueue("history", "--json").stdout)
    assert row["user_id"] == odd


def test_characters_that_do_not_exist_are_spelled_out(make_queue, env):
    """Where standard output takes Latin-1 only, the others are shown by their numbers; nothing fails."""
    make_queue(drain=False).record("GROUP_A", "ÜSER_Ω")
    code, said, errors = run(env, "history", PYTHONIOENCODING="latin-1")
    assert (code, errors) == (0, "")
    assert "ÜSER_\\u03a9" in said.decode("latin-1")


@pytest.mark.parametrize(
    ("more", "sequences"),
    [
        ({"TERM": "xterm-256color"}, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, False),
    ],
    ids=["colours", "NO_COLOR", "dumb", "dumb, FORCE_COLOR"],
)
def test_colours_are_asked_for_by_the_terminal(make_queue, env, more, sequences):
    """The live picture is coloured, except with NO_COLOR; a dumb terminal gets plain lines."""
    pytest.importorskip("rich")
    make_queue(drain=False)
    with Terminal(["-m", "perqueue", "status", "--watch", "--interval", "0.1"], {**env, **more}) as terminal:
        terminal.until("nothing is pending")
        assert terminal.end(signal.SIGINT) == 0
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9](;[0-9]+)*m", terminal.output)) == sequences
    if more["TERM"] == "dumb":
        assert "\x1b" not in terminal.output


@pytest.mark.parametrize(
    ("arguments", "more", "says"),
    [
        (["drain"], {"PER_ACTIVITY_TOKEN": "a b"}, "PER_ACTIVITY_TOKEN must be"),
        (["report"], {"PER_REPORTING_TOKEN": "a b"}, "PER_REPORTING_TOKEN must be"),
        (["record", "G", "U"], {"PER_BASE_URL": "nonsense"}, "PER_BASE_URL must look like"),
        (["record", "G", "U"], {"PER_BASE_URL": "https://example.com"}, "PER_BASE_URL"),
        (["history", "--since", "soon"], {}, "--since is not"),
        (["datasette", "-o", "/etc"], {}, "not a regular file"),
        (["datasette", "-o", "/etc/passwd"], {}, "is not an outbox"),
        (["sandbox", "--host", "192.0.2.1"], {}, "try --host 127.0.0.1"),
        (["completion"], {}, "bash, zsh, fish. See '"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_error_speaks_the_language_of_the_command_line(perqueue, make_queue, arguments, more, says):
    """An error names the variable or the option to change, not what the library calls it."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    result = perqueue(*arguments, **more)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert says in result.stderr


@pytest.mark.parametrize(("arguments", "kind"), [(["drain"], "ACTIVITY"), (["report"], "REPORTING")])
def test_a_refused_token_is_named(perqueue, make_queue, arguments, kind):
    """Where Per refuses a token, the error names its variable, and where to get another."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    result = perqueue(*arguments, **{f"PER_{kind}_TOKEN": "unknown"})
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert f"PER_{kind}_TOKEN" in result.stderr
    assert "https://useper.com/tokens" in result.stderr


def test_every_help_text_fits_80_columns(perqueue):
    """No line of a help text is wider than a terminal of 80 columns, and no command to copy is broken."""
    commands = [name.split() for name in ("", "rejected list", "rejected requeue", "rejected discard")]
    for arguments in [*commands, *([name] for name in main.commands)]:
        said = perqueue(*arguments, "--help").output
        assert [line for line in said.splitlines() if len(line) > 80] == [], arguments
        assert not re.search(r"pip install [^`]*-\n", said), arguments
