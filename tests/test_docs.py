"""The guides are promises too: their Python runs, and their commands exist."""

import re
from pathlib import Path

import click
import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from perqueue.cli import main
from tests.test_readme import commands, words

AUDIT = Path(__file__).resolve().parent.parent / "docs" / "audit.md"
TEXT = AUDIT.read_text(encoding="utf-8")


def blocks():
    document = Document(TEXT, str(AUDIT))
    for region in PythonCodeBlockParser()(document):
        document.add(region)
    return list(document)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"line {block.line}")
def test_python_in_the_guide_to_audits_runs(block, make_queue):
    """Every Python block of `docs/audit.md` runs by itself, given a queue."""
    queue = make_queue()
    queue.record("GROUP_A", "USER_1").wait()
    block.document.namespace.clear()
    block.document.namespace["queue"] = queue
    block.evaluate()


@pytest.mark.parametrize(
    "line", [re.sub(r"^\$ | > .*", "", line) for line in commands(TEXT) if "perqueue " in line]
)
def test_commands_in_the_guide_to_audits_exist(line):
    """Every `perqueue …` of `docs/audit.md` is a command with these options."""
    command, arguments = main, words(line)[1:]
    while isinstance(command, click.Group) and arguments:
        command = command.commands[arguments.pop(0)]
    command.make_parser(click.Context(command)).parse_args(list(arguments))
