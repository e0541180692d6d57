"""The order of the checks: from the file outwards, each group on what the ones before it have learned."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from perqueue._address import DatabaseURL
from perqueue._lock import is_drained
from perqueue._outbox import examine_database
from perqueue._outbox.examine import contents, users_of, wal
from perqueue._outbox.finding import moment, problem, warning
from perqueue._outbox.flow import Known
from perqueue._settings import DEFAULT_BASE_URL, checked_base_url, origin_of
from perqueue._status import crossing
from perqueue.cli._checks import answer, machine, programs, tokens
from perqueue.cli._checks import place as folder
from perqueue.cli._checks.deadline import Deadline
from perqueue.cli._checks.reach import Target, Unreachable, reach
from perqueue.exceptions import ConfigurationError, OutboxError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from perqueue._outbox.finding import Finding

    Groups = Iterator[tuple[str, Iterator[Finding]]]

DEADLINE = 10.0
"""Seconds for everything that goes over the network."""


def visit(
    place: Path | DatabaseURL, environ: Mapping[str, str], now: int, context: ssl.SSLContext | None
) -> Groups:
    """Yield groups of findings, each with its title; a group must be used up before the next.

    ``now`` is in milliseconds since the epoch; without a ``context`` Per is not asked. Raises
    :class:`OSError` if this user may not look.
    """
    known = Known()
    if isinstance(place, DatabaseURL):
        yield from _database(place, now, known)
    else:
        yield from _file(place, now, known)
    in_file = not isinstance(place, DatabaseURL)
    yield "Machine", machine.look(environ, known.origin, in_file=in_file)
    if context is None:
        yield "Tokens", tokens.look(environ, None, "--offline")
        return
    configured = _valid(environ.get("PER_BASE_URL") or DEFAULT_BASE_URL)
    base_url = configured
    if known.origin is not None and (configured is None or origin_of(configured) != known.origin):
        base_url = _valid(known.origin)
    if base_url is None or not (known.legible or environ.get("PER_BASE_URL")):
        yield "Tokens", tokens.look(environ, None, "nobody knows where its Per is (PER_BASE_URL)")
        return
    yield from _online(Target(base_url=base_url, context=context, environ=environ), known, configured)


def _file(path: Path, now: int, known: Known) -> Groups:
    users, drained = users_of(path), is_drained(path)
    yield "File", chain(folder.look(path), wal(path, users))
    yield "Programs", programs.look(path, users, drained=drained)
    yield "Contents", chain(contents(path, users, now, known, drained=drained), _month_end(known, now))


def _database(url: DatabaseURL, now: int, known: Known) -> Groups:
    try:
        for title, findings in examine_database(url, now, known):
            yield title, chain(_legible(findings), _month_end(known, now) if title == "Contents" else ())
    except OutboxError as error:
        yield "Database", iter([_unusable(error)])


def _legible(findings: Iterator[Finding]) -> Iterator[Finding]:
    try:
        yield from findings
    except OutboxError as error:
        yield _unusable(error)


def _unusable(error: OutboxError) -> Finding:
    return problem("database", str(error), "the server, the network or the URL, as it says")


def _online(target: Target, known: Known, configured: str | None) -> Groups:
    deadline = Deadline(DEADLINE)
    conversation = answer.Conversation(target, deadline)
    try:
        yield f"Network: {target.base_url}", _network(target, known, conversation, deadline)
        if configured != target.base_url:  # the file may be anybody's
            silence = f"tokens go to PER_BASE_URL only; for this outbox set it to {target.base_url}"
            yield "Tokens", tokens.look(target.environ, None, silence)
        elif not conversation.is_per:
            yield "Tokens", tokens.look(target.environ, None, "see above")
        else:
            yield "Tokens", tokens.look(target.environ, conversation, "")
    finally:
        conversation.close()


def _network(
    target: Target, known: Known, conversation: answer.Conversation, deadline: Deadline
) -> Iterator[Finding]:
    try:
        yield from reach(target, deadline)
    except Unreachable as end:
        yield end.finding
        return
    if known.asked_to_wait_until is not None:
        text = f"Per wants no request before {moment(known.asked_to_wait_until)}, so none was made"
        yield warning("answer", text, "look again after that")
        return
    yield from answer.look(conversation, target)


def _month_end(known: Known, now: int) -> Iterator[Finding]:
    end = crossing(known.pending, now)
    if end is not None:
        text = f"it is near ({end:%Y-%m-%d %H:%M} UTC): what Per has not got by then counts in {end:%B}"
        yield warning("month end", text, "see that what is pending is delivered before")


def _valid(url: str) -> str | None:
    try:
        return checked_base_url(url)
    except ConfigurationError:
        return None
