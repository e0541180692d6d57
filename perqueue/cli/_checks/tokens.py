"""The tokens of this environment: their form, and whether Per lets them in.

Per documents no request that only checks a token. What it documents is this: `activities.add` counts one
user, whom three parameters name together with billing ID and activity type; `reports.get` only reads; and a
token that is unknown, or lacks the scope, is answered 401 `invalid_auth_token`.

So the reporting token is tried on a report, of the latest second. The activity token is tried on an
`activities.add` that names nobody: no user, no billing ID, no activity type, so that whatever Per made of it,
it could be nobody's activity. That Per refuses such a request is likely, and not documented. What its
refusal is worth is known from a control, the same request without any token, made first:

- with the token `invalid_auth_token`: the token is bad, which is documented;
- without it `invalid_auth_token`, with it another refusal: the token made the difference. It was let in;
- the same refusal with it and without it: Per looks at the parameters first, and nothing is known.

A yes is told as a problem, with its transaction ID. No token is sent before the control has shown that what
answers speaks like Per, nor anywhere that only the outbox file names: that may be somebody else's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from perqueue._activity import Verdict
from perqueue._outbox.finding import ok, problem, warning
from perqueue._settings import checked_token
from perqueue._wire.redaction import Secret, redacted
from perqueue.cli._checks.answer import ADD, REPORT, NoAnswer
from perqueue.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from perqueue._outbox.finding import Finding
    from perqueue.cli._checks.answer import Conversation

_NEW = "take another from https://useper.com/tokens; the program that delivers needs it, too, and a restart"


class _Word(Enum):
    REFUSED = auto()
    """Per does not know it, or it lacks the scope."""
    LET_IN = auto()
    """The request was refused, and not for the token."""
    YES = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class _Reply:
    word: _Word
    why: str


def look(environ: Mapping[str, str], conversation: Conversation | None, silence: str) -> Iterator[Finding]:
    """Judge both tokens; ``silence`` says why Per is not asked if there is no conversation."""
    for scope, judge in (("activity", _activity), ("reporting", _reporting)):
        name = f"PER_{scope.upper()}_TOKEN"
        given = environ.get(name)
        if not given:
            remedy = "export the one that the program uses, and look again: it cannot be an argument"
            yield warning(scope, f"{name} is not set here, so it is not checked", remedy)
            continue
        try:
            token = Secret(checked_token(name, given))
        except ConfigurationError as error:
            yield problem(scope, str(error), _form_remedy(given))
            continue
        if given[0] in "\"'" or given[-1] in "\"'":
            text = f"{name} begins or ends with a quotation mark"
            yield warning(scope, text, "is it part of it? An env file may have kept the quotes of a shell")
        if conversation is None:
            yield ok(scope, f"{name} has the form of a token; Per was not asked: {silence}")
        else:
            yield judge(conversation, token, name)


def _form_remedy(given: str) -> str:
    if given.strip().lower().startswith("bearer "):
        return "leave out the word Bearer: the variable holds the token alone"
    if given != given.strip():
        return "there is white space around it: a line break from a file, as a rule"
    return "copy it once more from https://useper.com/tokens"


def _activity(conversation: Conversation, token: Secret, name: str) -> Finding:
    reply = _nameless(conversation, token)
    if reply.word is _Word.YES:
        text = f"Per says yes, with {name}, to a request that names nobody ({reply.why})"
        return problem("activity", text, "tell Per's support: it may have counted a user without a name")
    if reply.word is _Word.UNKNOWN:
        return _unknown("activity", reply)
    if reply.word is _Word.REFUSED:
        if _recently(conversation, token).word in (_Word.YES, _Word.LET_IN):
            text = f"{name} may read reports, and may not add activities: are the two tokens swapped?"
            return problem("activity", text, "set each to the token with its own scope")
        text = f"Per refuses {name} ({reply.why}): unknown there, or without the scope activity"
        return problem("activity", text, _NEW)
    if not conversation.is_selective:
        text = f"Per did not refuse {name}, nor a request without a token: nothing is known ({reply.why})"
        return warning("activity", text, "`perqueue drain` tells, with something pending")
    text = (
        f"Per did not refuse {name}. Asked with a request that names nobody, so that nothing is counted:"
        f" with the token it was refused for its content ({reply.why}), without one for the missing token"
    )
    return ok("activity", text)


def _reporting(conversation: Conversation, token: Secret, name: str) -> Finding:
    reply = _recently(conversation, token)
    if reply.word is _Word.YES:
        return ok("reporting", f"Per gives a report for {name} (asked for that of the latest second)")
    if reply.word is _Word.LET_IN:
        return ok("reporting", f"Per did not refuse {name}, only this report ({reply.why})")
    if reply.word is _Word.UNKNOWN:
        return _unknown("reporting", reply)
    if conversation.is_selective and _nameless(conversation, token).word is _Word.LET_IN:
        text = f"{name} may add activities, and may not read reports: are the two tokens swapped?"
        return problem("reporting", text, "set each to the token with its own scope")
    text = f"Per refuses {name} ({reply.why}): unknown there, or without the scope reporting"
    return problem("reporting", text, _NEW)


def _unknown(scope: str, reply: _Reply) -> Finding:
    return warning(scope, f"Per did not say whether it knows this token: {reply.why}", "look again later")


def _nameless(conversation: Conversation, token: Secret) -> _Reply:
    return _ask(conversation, ADD, {}, token)


def _recently(conversation: Conversation, token: Secret) -> _Reply:
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 1))
    return _ask(conversation, REPORT, {"start": start}, token)


def _ask(conversation: Conversation, path: str, parameters: Mapping[str, str], token: Secret) -> _Reply:
    try:
        answer = conversation.ask(path, parameters, token)
    except NoAnswer as error:
        return _Reply(_Word.UNKNOWN, str(error))
    outcome = answer.outcome(token)
    why = redacted(f"HTTP {answer.status}, {outcome.reason or outcome.transaction_id}", token)
    if answer.said is not None and answer.said["ok"] and answer.status < 300:
        return _Reply(_Word.YES, why)
    word = {Verdict.BAD_TOKEN: _Word.REFUSED, Verdict.REJECTED: _Word.LET_IN}
    return _Reply(word.get(outcome.verdict, _Word.UNKNOWN), why)
