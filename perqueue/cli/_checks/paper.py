"""Writing down what was found, as it is found: groups, lines with their remedy below, and what comes next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from perqueue._outbox.examine import SALVAGE, users_of
from perqueue._outbox.finding import Level
from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._checks.programs import names_of

if TYPE_CHECKING:
    from perqueue._address import DatabaseURL
    from perqueue._outbox.finding import Finding

_COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
_INDENT = 22
_WIDEST = 100


class Paper:
    """What was found so far; printed at once, unless it is ``silent``."""

    def __init__(self, place: Path | DatabaseURL, *, silent: bool) -> None:
        self._place = place
        self._silent = silent
        self._group = ""
        self._is_damaged = False
        # Elsewhere than on a terminal a finding is one line, and its remedy another: for grep.
        self._is_terminal = sys.stdout.isatty()
        self._width = min(_WIDEST, shutil.get_terminal_size().columns) if self._is_terminal else 0
        self.findings: list[dict[str, Any]] = []

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return not self._count(Level.PROBLEM)

    def _count(self, level: Level) -> int:
        return sum(finding["level"] is level for finding in self.findings)

    def begin(self, group: str) -> None:
        """Begin a group."""
        if not self._silent:
            click.echo(("\n" if self._group else "") + self._styled(_print.printable(group), bold=True))
        self._group = group

    def write(self, finding: Finding) -> None:
        """Take down a finding."""
        self.findings.append({"group": self._group.partition(":")[0]} | asdict(finding))
        self._is_damaged |= SALVAGE in (finding.remedy or "")
        if self._silent:
            return
        level = self._styled(f"{finding.level:<8}", fg=_COLOURS[finding.level])
        lines = self._lines(finding.text)
        click.echo(f"  {level} {finding.about:<10} {lines[0]}")
        rest = lines[1:]
        if finding.remedy is not None:
            rest += self._lines(finding.remedy, "-> ")
        for line in rest:
            click.echo(f"{'':<{_INDENT}}{line}")

    def _lines(self, text: str, sign: str = "") -> list[str]:
        clean = _print.printable(text)
        if not self._width:
            return [sign + clean]
        return textwrap.wrap(
            clean,
            max(20, self._width - _INDENT),
            initial_indent=sign,
            subsequent_indent=" " * len(sign),
            break_on_hyphens=False,
            break_long_words=False,  # a path, to be copied
        )

    def _styled(self, text: str, **style: Any) -> str:
        return click.style(text, **style) if self._is_terminal and not os.environ.get("NO_COLOR") else text

    def end(self) -> None:
        """Say what it amounts to."""
        problems, warnings = self._count(Level.PROBLEM), self._count(Level.WARNING)
        said = [
            counted(count, word) for count, word in ((problems, "problem"), (warnings, "warning")) if count
        ]
        click.echo(f"\n{' and '.join(said) or 'Nothing is wrong'}.")
        if self._is_damaged and isinstance(self._place, Path):
            self._lead_to_salvage(self._place)

    def _lead_to_salvage(self, path: Path) -> None:
        new = path.with_name(f"{path.stem}-rescued{path.suffix}")
        users = names_of(users_of(path))
        command = f"perqueue doctor --outbox {shlex.quote(str(path))} --salvage {shlex.quote(str(new))}"
        steps = (
            f"Stop the programs that use it{f' ({users})' if users else ''}.",
            command,
            f"Start them with PERQUEUE_OUTBOX={shlex.quote(str(new))}, and keep the old file.",
        )
        click.echo("\nTo go on with everything that can be read of this file:")
        for number, step in enumerate(steps, 1):
            click.echo(f"  {number}. {_print.printable(step)}")
