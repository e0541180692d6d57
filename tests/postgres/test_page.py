"""What docs/postgresql.md shows is run."""

import shlex

import pytest
from click.testing import CliRunner

from perqueue import PerQueue
from perqueue.cli import main
from tests.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "postgresql.md")
COMMANDS = [line for line in PAGE.commands() if line.startswith("perqueue ") and "--watch" not in line]
"""What goes on until it is told to end is tried in test_commands.py."""
SHOWN = "postgresql://app@db.example/billing"


@pytest.fixture
def equipped(outbox, options, monkeypatch, tmp_path):
    """What a reader of the page has in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERQUEUE_OUTBOX", outbox)
    for name, value in options.items():
        monkeypatch.setenv(f"PER_{name.upper()}", value)


@pytest.mark.parametrize("block", PAGE.python(), ids=lambda block: str(block.line))
@pytest.mark.usefixtures("equipped")
def test_python_runs(block, outbox, per):
    """Every block delivers what it records."""
    code = block.parsed.replace(SHOWN, outbox)
    assert SHOWN in block.parsed
    exec(compile(code, PAGE.name, "exec"), {})
    assert per.accepted == 1


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.usefixtures("equipped")
def test_commands_work(line, outbox, tmp_path):
    """Every command works with the outbox that it names."""
    PerQueue(drain=False).close()
    PerQueue(tmp_path / "activities.db", drain=False).close()
    words = [outbox if word == SHOWN else word for word in shlex.split(line)]
    words = [str(tmp_path / "activities.db") if word.endswith(".db") else word for word in words]
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, result.output
