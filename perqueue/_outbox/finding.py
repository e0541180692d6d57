"""What was found in looking at an outbox and its surroundings, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from perqueue._clock import moment_from_ms


class Level(StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """Worth knowing: nothing has to be done at once, or nobody can tell from here."""
    PROBLEM = "problem"
    """Somebody has to do something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    about: str
    level: Level
    text: str
    remedy: str | None = None


def ok(about: str, text: str) -> Finding:
    """Return that all is as it should be."""
    return Finding(about=about, level=Level.OK, text=text)


def warning(about: str, text: str, remedy: str | None = None) -> Finding:
    """Return what is worth knowing."""
    return Finding(about=about, level=Level.WARNING, text=text, remedy=remedy)


def problem(about: str, text: str, remedy: str) -> Finding:
    """Return what is wrong."""
    return Finding(about=about, level=Level.PROBLEM, text=text, remedy=remedy)


def moment(milliseconds: int) -> str:
    """Return a time for people, in UTC."""
    return f"{moment_from_ms(milliseconds):%Y-%m-%d %H:%M:%S} UTC"


def size(count: int) -> str:
    """Return a number of bytes for people."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"
