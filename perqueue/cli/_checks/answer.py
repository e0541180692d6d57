"""Asking Per, without telling it of any activity: does it answer, and how late is it there?"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from perqueue._activity import Outcome, Verdict
from perqueue._answers import _http_date, interpret, parse_json, presentable
from perqueue._outbox.finding import ok, problem, warning
from perqueue._version import __version__
from perqueue._wire.redaction import mask_logs, redacted
from perqueue.cli import _print

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import httpx

    from perqueue._answers import Headers
    from perqueue._outbox.finding import Finding
    from perqueue.cli._checks.deadline import Deadline
    from perqueue.cli._checks.reach import Target

ADD = "/activities.add"
REPORT = "/reports.get"
_PATIENCE = 4.0
_LARGEST = 1024 * 1024
_HEADERS = {
    "User-Agent": f"useper-perqueue/{__version__}",
    "Accept": "application/json",
    "Accept-Encoding": "identity",
    "Cache-Control": "no-store",
}
_DATE_STEP = 1.0
"""Seconds to which a ``Date`` header is exact: it is cut, not rounded."""
_TOLERATED = 2.0
"""Seconds by which any two machines' clocks may differ."""
_MUCH = 60.0


class NoAnswer(Exception):
    """Nothing came back that could be an answer; the text says what did."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    # A server may repeat the token in both, and a traceback may show local variables.
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)
    asked_at: float
    answered_at: float
    """Seconds since the epoch, both."""
    seconds: float
    """From sending the request to the head of the answer, with the time that a new connection took."""

    @property
    def said(self) -> dict[str, Any] | None:
        """Return what Per says; None if this is nobody's who speaks like Per."""
        said = parse_json(self.body)
        return said if said is not None and isinstance(said.get("ok"), bool) else None

    def outcome(self, token: str = "") -> Outcome:
        """Return what it would mean for an activity."""
        return interpret(
            self.status, self.headers, self.body, self.answered_at, redact=lambda text: redacted(text, token)
        )


class Conversation:
    """Single requests to one server: no redirect, no proxy, no cookie, and no second try."""

    def __init__(self, target: Target, deadline: Deadline) -> None:
        self._target = target
        self._deadline = deadline
        self._client: httpx.Client | None = None
        self.is_per = False
        """Whether what answers speaks like Per: only then it may see a token."""
        self.is_selective = False
        """Whether it refuses a request without a token, for want of one."""

    def ask(self, path: str, parameters: Mapping[str, str], token: str | None = None) -> Answer:
        """Send one GET; raises :class:`NoAnswer`."""
        patience = self._deadline.left(_PATIENCE)
        try:
            return self._deadline.run(lambda: self._ask(path, parameters, token), patience)
        except TimeoutError:
            failure = f"no answer within {patience:.1f} s"
        except Exception as error:  # noqa: BLE001 - whatever httpx raises: there is no answer
            name = type(error).__name__
            # It quotes the server, which may repeat what it was sent.
            failure = (
                name if "Protocol" in name else f"{name}: {presentable(redacted(str(error), token or ''))}"
            )
        raise NoAnswer(failure)

    def _ask(self, path: str, parameters: Mapping[str, str], token: str | None) -> Answer:
        import httpx

        if self._client is None:
            timeout = self._deadline.left(_PATIENCE)
            self._client = httpx.Client(verify=self._target.context, trust_env=False, timeout=timeout)
        headers = dict(_HEADERS)
        if token is not None:
            mask_logs(token)
            headers["Authorization"] = f"Bearer {token}"
        url = f"{self._target.base_url}{path}"
        asked_at, began = time.time(), time.monotonic()
        with self._client.stream("GET", url, params=parameters, headers=headers) as response:
            answered_at, seconds = time.time(), time.monotonic() - began
            body = b""
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > _LARGEST:
                    break
        self._client.cookies.clear()
        return Answer(response.status_code, response.headers, body, asked_at, answered_at, seconds)

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()


def look(conversation: Conversation, target: Target) -> Iterator[Finding]:
    """Ask without a token, and so that nobody could be counted: who answers, and what is the time there?"""
    try:
        answer = conversation.ask(ADD, {})
    except NoAnswer as error:
        remedy = target.blocked(
            "Per is down, or something in between is: nothing is lost, it resumes by itself"
        )
        yield problem("answer", f"it takes connections, and does not answer: {error}", remedy)
        return
    finding = _odd(answer, target)
    if finding is None:
        conversation.is_per = True
        conversation.is_selective = answer.outcome().verdict is Verdict.BAD_TOKEN
        yield ok(
            "answer",
            f"Per's JSON, HTTP {answer.status} ({answer.seconds * 1000:,.0f} ms, connecting included)",
        )
    else:
        yield finding
    yield _skew(answer)


def _odd(answer: Answer, target: Target) -> Finding | None:
    """Say what is odd about the answer to a request without a token; None if nothing is."""
    kind = presentable(answer.headers.get("content-type", "no content type"), longest=40)
    if 300 <= answer.status < 400:
        where = presentable(answer.headers.get("location", "nowhere"), longest=200)
        parts = urlsplit(where)
        where = f"{parts.scheme}://{parts.netloc}" if parts.netloc else where
        text = f"HTTP {answer.status}: it sends who asks elsewhere, to {where}; perqueue does not follow"
        remedy = "a captive portal wants a sign-in, a proxy is in between, or PER_BASE_URL is wrong"
        return problem("answer", text, target.blocked(remedy))
    if answer.status == 429 or answer.outcome().verdict is Verdict.RATE_LIMITED:
        remedy = "wait: delivery does so by itself. Do not run this from cron without --offline"
        return warning("answer", f"HTTP {answer.status}: it asks for fewer requests", remedy)
    if answer.status >= 500:
        text = f"HTTP {answer.status} ({kind}): Per or what stands before it fails"
        return problem("answer", text, "nothing to do here: nothing is lost, delivery resumes by itself")
    if answer.said is None:
        text = f"HTTP {answer.status} ({kind}): that is not Per's JSON"
        remedy = "a captive portal or a proxy answers instead, or PER_BASE_URL is wrong"
        return problem("answer", text, target.blocked(remedy))
    if answer.said["ok"]:
        text = "it says yes to a request without a token, which Per would not"
        return problem("answer", text, "is PER_BASE_URL right? Something else answers there")
    return None


def _skew(answer: Answer) -> Finding:
    """Compare the clocks: the server's lies in the second that its ``Date`` names, at a moment between
    question and answer.
    """
    there = _http_date(answer.headers.get("date", ""))
    if there is None:
        return ok("skew", "not compared: the answer has no Date")
    # How much this machine is ahead, at least and at most.
    least, most = answer.asked_at - there - _DATE_STEP, answer.answered_at - there
    certain = max(least, -most, 0.0)
    if certain <= _TOLERATED:
        return ok(
            "skew", f"the clocks agree within {max(abs(least), abs(most)):.1f} s (a Date is exact to 1 s)"
        )
    by = f"{certain:.0f} s" if certain < _MUCH else _print.age(certain)
    text = (
        f"this machine's clock is {by} {'ahead' if least > 0 else 'behind'}. Per dates by arrival, so no bill"
        " changes; recorded_at, `late` and `reconcile` here are wrong by as much"
    )
    level = problem if certain >= _MUCH else warning
    return level("skew", text, "let NTP set the clock (timedatectl)")
