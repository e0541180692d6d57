"""What stands in README.md and docs/: the Python of a page, and its commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

if TYPE_CHECKING:
    from sybil import Example

ROOT = Path(__file__).resolve().parent.parent


class Page:
    """A page of text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_text(encoding="utf-8")

    def python(self) -> list[Example]:
        """Return the Python blocks, which share a namespace."""
        # A fixed port makes the example one that can be run twice; a test must not depend on it being free.
        document = Document(self.text.replace("Sandbox(port=8423)", "Sandbox()"), str(self.path))
        for region in PythonCodeBlockParser()(document):
            document.add(region)
        return list(document)

    def commands(self) -> list[str]:
        """Return each command once, without its comment: those of the blocks, and those in running text."""
        lines = []
        for block in re.findall(r"^```console\n(.*?)^```", self.text, re.DOTALL | re.MULTILINE):
            told = [line for line in block.splitlines() if line.startswith("$ ")]
            typed = [line.removeprefix("$ ") for line in told] or block.splitlines()
            lines += [line.partition(" #")[0].strip() for line in typed]
            lines += re.findall(r"#.*: (perqueue .*)$", block, re.MULTILINE)  # what a comment offers instead
        lines += [" ".join(aside.split()) for aside in re.findall(r"`(perqueue [a-z][^`]*)`", self.text)]
        return [line for line in dict.fromkeys(lines) if line]


def words(command: str) -> list[str]:
    """Return the words of a command, up to what it reads or writes, or what comes after it."""
    split = shlex.split(command)
    ends = [number for number, word in enumerate(split) if word in ("<", ">", "|", "||", "&&", "&")]
    return split[: ends[0]] if ends else split


def pages() -> list[Page]:
    """Return README.md and every page of docs/."""
    return [Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
