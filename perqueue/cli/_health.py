"""From an outbox as it is seen to words: what goes on, why, and what to do about it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from perqueue.cli import _print

if TYPE_CHECKING:
    from perqueue._outbox import Hold
    from perqueue._outbox.look import Look
    from perqueue.cli._sight import Sight

PAUSES = ("bad_token", "refused")
"""Kinds of a hold that waiting does not end."""
_QUIET_MS = 30_000
"""How long no request may end before that is worth a word: three times the usual deadline of one."""

_RESTART = "start the program that delivers, or `perqueue drain --watch`"
_BAD_TOKEN = "give the drainer a token with the scope activity, and restart it"  # noqa: S105 - words
_TYPE = "as a rule the activity type is wrong: correct it in the program and restart that"
_PATIENCE = "Per or the way to it is down: nothing to do here, it resumes by itself"


class Mood(StrEnum):
    """How much somebody has to care."""

    WELL = "well"
    WAITING = "waiting"
    """Something is away, and waiting mends it."""
    TROUBLE = "trouble"
    """Somebody has to do something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """What there is to say."""

    mood: Mood
    text: str
    remedy: str | None = None

    def line(self) -> str:
        """Return it all in one line."""
        said = self.text + (f" -> {self.remedy}" if self.remedy else "")
        return _print.printable(" ".join(said.split()))


def judge(sight: Sight) -> Health:
    """Return the one thing that matters most."""
    look = sight.look
    if look is None:
        return Health(mood=Mood.TROUBLE, text=f"outbox trouble: {str(sight.error).removeprefix('outbox ')}")
    hold = look.position.hold if look.position.pending else None
    if sight.is_full:
        text = f"disk full: {(sight.room or 0) // 1024:,} KiB are free where the outbox is"
        return Health(mood=Mood.TROUBLE, text=text, remedy="free space: all goes on by itself then")
    if hold is not None and hold.kind in PAUSES:
        return _paused(sight, hold)
    if sight.drained is False:
        return _unattended(look, hold)
    if hold is not None and _until(hold, sight.now) > sight.now:
        return _waiting(sight, hold)
    return _flowing(sight, look, hold)


def _paused(sight: Sight, hold: Hold) -> Health:
    until = _until(hold, sight.now)
    probe = f"; it tries one again at {clock(until)}" if until > sight.now and sight.drained else ""
    if hold.kind == "bad_token":
        return Health(
            mood=Mood.TROUBLE, text=f"paused: bad token: Per says {hold.reason}{probe}", remedy=_BAD_TOKEN
        )
    text = f"paused: everything is refused: Per says {hold.reason}{probe}"
    return Health(mood=Mood.TROUBLE, text=text, remedy=_TYPE)


def _unattended(look: Look, hold: Hold | None) -> Health:
    if not look.position.pending:
        return Health(mood=Mood.WELL, text="idle: nothing is pending, and nobody drains")
    text = "nobody drains"
    if hold is not None:
        text += f"; who did backed off because {hold.reason}"
    return Health(mood=Mood.TROUBLE, text=text, remedy=_RESTART)


def _waiting(sight: Sight, hold: Hold) -> Health:
    until = _until(hold, sight.now)
    left = _print.age((until - sight.now) / 1000)
    if hold.kind == "retry_after":
        text = f"waiting until {clock(until)} ({left}) because Per asked to: {hold.reason}"
        return Health(mood=Mood.WAITING, text=text, remedy="nothing to do here, it resumes by itself")
    text = f"backing off until {clock(until)} ({left}) because {hold.reason}"
    return Health(mood=Mood.WAITING, text=text, remedy=_PATIENCE)


def _flowing(sight: Sight, look: Look, hold: Hold | None) -> Health:
    position = look.position
    if not position.pending:
        return Health(mood=Mood.WELL, text=f"idle: nothing is pending, {sight.drainer} drains")
    quiet = (sight.now - _busy_until(look, hold)) / 1000
    if sight.drained and quiet * 1000 > _QUIET_MS:
        text = f"stalled: {sight.drainer} drains, and for {_print.age(quiet)} no request has come to an end"
        remedy = "see its log; if it is frozen (a debugger, SIGSTOP), thaw or restart it"
        return Health(mood=Mood.TROUBLE, text=text, remedy=remedy)
    if hold is not None:
        return Health(
            mood=Mood.WAITING,
            text=f"backing off, and trying again now, because {hold.reason}",
            remedy=_PATIENCE,
        )
    waiting = look.next_due is not None and look.next_due > sight.now
    if waiting and look.next_due is not None and position.drained_through >= position.last_id:
        text = f"retrying at {clock(look.next_due)} what failed while others got through"
        if look.failures:
            text += f": {look.failures[0].reason}"
        return Health(mood=Mood.WAITING, text=text)
    who = f"{sight.drainer} drains" if sight.drained else "who drains is unknown: this user may not see it"
    return Health(mood=Mood.WELL, text=f"delivering: {who}")


def _busy_until(look: Look, hold: Hold | None) -> int:
    """Return the latest moment until which silence is as it should be."""
    moments = [request.at for request in (*look.answers, *look.failures)]
    oldest = look.position.oldest_pending
    moments += [oldest[1]] if oldest is not None else []
    moments += [hold.until] if hold is not None else []
    moments += [look.next_due] if look.next_due is not None else []
    return max(moments, default=0)


def _until(hold: Hold, now: int) -> int:
    return min(hold.until, now + hold.wait_ms)  # the clock may have been set back


def clock(at: int) -> str:
    """Return the local time of day of a moment given in milliseconds since the epoch."""
    return time.strftime("%H:%M:%S", time.localtime(at / 1000))
