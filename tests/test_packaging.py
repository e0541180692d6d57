import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import perqueue

ROOT = Path(__file__).resolve().parent.parent

# The bare name belongs to an unrelated package on the public index.
INSTALLS_A_STRANGER = re.compile(
    r"(?:\b(?:pip3?|uv|poetry|pdm)\b[^\n#&|;`(]*?\b(?:install|add|download)|\bpipx (?:install|run)|\buvx)\b"
    r"[^\n#&|;`(]*?[\s\"']perqueue(?=[\s\"'`\[<>=~!@,;]|$)"
)


def tracked_files():
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout: {error}")
    return [path for path in map(ROOT.joinpath, names.split("\0")) if path.is_file()]


def test_version_is_written_once():
    """The version that pip knows is the version that the package says it has."""
    assert version("useper-perqueue") == perqueue.__version__


def test_public_names_exist_and_are_sorted():
    """Every name in `__all__` can be imported, once, and they are listed in order."""
    names = perqueue.__all__
    assert list(names) == sorted(set(names))
    assert [name for name in names if not hasattr(perqueue, name)] == []


@pytest.mark.parametrize(
    "line",
    [
        "pip install PERQUEUE",
        "pip install -U 'PERQUEUE[sandbox]'",
        "uv add PERQUEUE>=0.1",
        "uvx PERQUEUE demo",
    ],
)
def test_the_search_for_a_wrong_installation_finds_one(line):
    """A line that would install the unrelated package is recognised as one."""
    assert INSTALLS_A_STRANGER.search(line.replace("PERQUEUE", "perqueue"))


@pytest.mark.parametrize(
    "line",
    [
        "pip install useper-perqueue",
        "pip install ./perqueue",
        "pip install -e . && perqueue demo",
        "perqueue drain",
    ],
)
def test_the_search_for_a_wrong_installation_lets_others_be(line):
    """A line that installs this package, or only runs it, is left alone."""
    assert not INSTALLS_A_STRANGER.search(line)


def test_nobody_is_told_to_install_a_stranger():
    """No file of the project tells anyone to install the unrelated package that has the bare name."""
    guilty = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        guilty += [
            f"{path.relative_to(ROOT)}: {match.group()}" for match in INSTALLS_A_STRANGER.finditer(text)
        ]
    assert guilty == []
