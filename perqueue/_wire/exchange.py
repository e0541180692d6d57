"""Per on the wire: one HTTP request at a time, and what became of it.

Straight over asyncio as a rule; through httpx's transports where one is given, or a proxy. httpx's client
on top of them is not used: redirects, cookies, settings from the environment and a log line at INFO with
the whole URL must not happen here.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from urllib.parse import quote, urlsplit

from perqueue._activity import Activity, Outcome, Verdict
from perqueue._answers import BAD_TOKEN_REASON, interpret, parse_json, presentable, reasons_of, retry_after
from perqueue._clock import SYSTEM_CLOCK
from perqueue._loop import DaemonThread
from perqueue._report import Report
from perqueue._settings import ClientSettings, checked_token, is_address
from perqueue._version import __version__
from perqueue._wire.connections import KEEP_ALIVE, Connections, StaleConnection
from perqueue._wire.parser import NotHTTP
from perqueue._wire.redaction import Concealed, Secret, mask_logs, redacted, without_token
from perqueue._wire.tls import distrust, tls_context
from perqueue._wire.transports import Transports, replica
from perqueue.exceptions import AuthenticationError, ConfigurationError, PerAPIError

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Mapping

    import httpx

    from perqueue._answers import Headers
    from perqueue._clock import Clock
    from perqueue._settings import Token

log = logging.getLogger("perqueue")

_LARGEST_ANSWER = 64 * 1024
_LARGEST_REPORT = 64 * 1024 * 1024

_HEADERS = (
    (b"User-Agent", f"useper-perqueue/{__version__}".encode()),
    (b"Accept", b"application/json"),
    (b"Accept-Encoding", b"identity"),
    # activities.add is a GET that changes things: no cache may answer it.
    (b"Cache-Control", b"no-store"),
)


class _TokenUnavailable(Exception):
    """The token's callable failed, or returned something that is no token."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    # A server may repeat the token in them, and a traceback may show local variables.
    headers: Headers = field(repr=False)
    body: bytes = field(repr=False)


def _call(which: str, token: Callable[[], object]) -> Secret | str:
    """Ask a token's callable; return the token, or why there is none.

    Whatever the user's code raises or returns, its text is told to nobody.
    """
    try:
        return Secret(checked_token(which, token()))
    except ConfigurationError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - KeyboardInterrupt, too, would end the thread and no more
        return f"the {which} callable raised {type(error).__name__}"


class Wire:
    """Sends single requests to Per, over connections that are kept alive and never shared by two requests."""

    def __init__(self, settings: ClientSettings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._clock = clock
        self._tls: ssl.SSLContext | None = None
        base = urlsplit(settings.base_url)
        self._prefix = base.path
        self._host = settings.origin.partition("://")[2].encode()
        self._headers_for: Secret | None = None
        self._headers = Concealed(())
        self._direct: Connections | None = None
        if settings.transport is None and settings.proxy is None:
            tls = base.scheme == "https"
            port = base.port or (443 if tls else 80)
            self._direct = Connections(
                base.hostname or "",
                port,
                self._context if tls else None,
                is_name=not is_address(settings.base_url),
            )
        self._transports = Transports(self._new_transport)
        self._start_afresh()
        auth = settings.proxy.auth if settings.proxy is not None else None
        self._password = [] if auth is None else [auth[1], b64encode(":".join(auth).encode()).decode()]

    def forget_connections(self) -> None:
        """Abandon every connection without touching it, in a forked child for instance."""
        if self._direct is not None:
            self._direct.forget()
        self._transports.forget()
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._thread: DaemonThread | None = None
        self._one_call = asyncio.Lock()
        self._asking: dict[str, asyncio.Task[Secret | str]] = {}  # calls that have not begun
        self._calls: set[asyncio.Task[Secret | str]] = set()

    async def aclose(self) -> None:
        """Close the connections, not a transport that was given."""
        if self._direct is not None:
            await self._direct.aclose()
        await self._transports.aclose()
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.close()

    def _new_transport(self) -> httpx.AsyncBaseTransport:
        import httpx

        if isinstance(self._settings.transport, httpx.AsyncHTTPTransport):
            return replica(self._settings.transport)
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEP_ALIVE)
        return httpx.AsyncHTTPTransport(
            verify=self._context(), trust_env=False, proxy=self._settings.proxy, limits=limits
        )

    def _context(self) -> ssl.SSLContext:
        """Return the one TLS context: making another takes 30 ms, for its authorities."""
        if self._tls is None:
            self._tls = tls_context(verify=self._settings.verify)
        return self._tls

    # -- one request

    def _deadline(self) -> float:
        """Return when a request that begins now must have ended, by the loop's monotonic clock."""
        return asyncio.get_running_loop().time() + self._settings.request_timeout

    async def _get(
        self,
        path: str,
        parameters: Mapping[str, str],
        token: Secret,
        deadline: float,
        *,
        largest: int = _LARGEST_ANSWER,
        again: bool = False,
    ) -> _Answer | str:
        """Send one GET and return the answer; or, in words, why there is none.

        The request's time is bounded as a whole, from connecting to the last byte. ``again`` allows a second
        request when the first went over a connection that was kept alive and had ended.
        """
        task = asyncio.current_task()
        cancellations = task.cancelling() if task is not None else 0
        query = "&".join([f"{name}={quote(value, safe='')}" for name, value in parameters.items()])
        target = f"{self._prefix}{path}" + (f"?{query}" if query else "")
        try:
            async with asyncio.timeout_at(deadline):
                try:
                    return await self._exchange(target, token, largest)
                except StaleConnection:
                    if not again:
                        raise
                log.debug("a connection that was kept alive ended before the answer: asking again")
                return await self._exchange(target, token, largest, new=True)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the map is total: a transport may raise anything
            if isinstance(error, asyncio.CancelledError) and task and task.cancelling() > cancellations:
                raise  # it is this task that is cancelled
            return self._describe(error, token, *parameters.values())

    async def _exchange(self, target: str, token: Secret, largest: int, *, new: bool = False) -> _Answer:
        headers = self._headers_with(token)
        if self._direct is not None:
            answer = await self._direct.get(target.encode(), headers, largest, new=new)
            _check_encoding(answer)
            return _Answer(answer.status, answer, bytes(answer.body))
        import httpx

        mask_logs(token, *self._password)
        request = httpx.Request("GET", f"{self._settings.origin}{target}", headers=list(headers))
        given = self._settings.transport
        if given is not None and not isinstance(given, httpx.AsyncHTTPTransport):
            return await _read(await given.handle_async_request(request), largest)
        async with self._transports.lend(new=new) as loan:
            try:
                response = await loan.transport.handle_async_request(request)
            except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
                if loan.reused:
                    raise StaleConnection from error
                raise
            return await _read(response, largest)

    def _headers_with(self, token: Secret) -> Concealed:
        if token != self._headers_for:
            bearer = (b"Authorization", b"Bearer " + token.encode())
            self._headers = Concealed(((b"Host", self._host), bearer, *_HEADERS))
            self._headers_for = token
        return self._headers

    def _describe(self, error: BaseException, token: Secret, *ids: str) -> str:
        """Say what went wrong, without anything secret."""
        if isinstance(error, StaleConnection) and error.__cause__ is not None:
            error = error.__cause__
        if isinstance(error, TimeoutError) and not error.errno:  # not the operating system's
            return f"no answer within {self._settings.request_timeout:g} s"
        if (complaint := distrust(error)) is not None:
            return presentable(complaint)
        text = str(error)
        for password in self._password:
            text = without_token(text, password)
        text = presentable(redacted(text, token, *ids))
        if isinstance(error, NotHTTP):
            return f"not an answer of Per's: {text}"
        name = type(error).__name__
        if name == "RemoteProtocolError":  # it quotes the server, which may repeat what it was sent
            text = text.partition(":")[0]
        # A malformed header's error quotes it in full.
        return name if not text or name in ("LocalProtocolError", "UnicodeEncodeError") else f"{name}: {text}"

    # -- the token

    async def _token(self, which: str, deadline: float) -> Secret:
        """Return the token, from its callable if it is one."""
        token: Token | None = getattr(self._settings, which)
        if token is None:
            message = f"{which} is missing: pass it or set PER_{which.upper()}"
            raise ConfigurationError(message)
        if not callable(token):
            return Secret(token)
        if (asking := self._asking.get(which)) is None:
            asking = asyncio.get_running_loop().create_task(self._ask(which, token))
            self._asking[which] = asking
            self._calls.add(asking)
            asking.add_done_callback(self._calls.discard)
        try:
            async with asyncio.timeout_at(deadline):
                answer = await asyncio.shield(asking)  # others may wait for it, too
        except TimeoutError:
            answer = f"the {which} callable has not returned within {self._settings.request_timeout:g} s"
        if not isinstance(answer, Secret):
            raise _TokenUnavailable(answer)
        return answer

    async def _ask(self, which: str, token: Callable[[], object]) -> Secret | str:
        """Call the callable for all who ask before it begins; return the token, or why there is none."""
        async with self._one_call:
            del self._asking[which]  # whoever asks from here on is owed another call
            # In a thread: a vault that is slow must not hold up the event loop, its deadlines and close().
            thread = self._token_thread()
            if thread is None:
                return _call(which, token)
            return cast("Secret | str", await thread.run(asyncio.get_running_loop(), _call, which, token))

    def _token_thread(self) -> DaemonThread | None:
        if self._thread is None:
            try:
                self._thread = DaemonThread("perqueue-token")
            except RuntimeError:
                return None  # the interpreter is shutting down: there is nothing left to hold up
            weakref.finalize(self, self._thread.close).atexit = False
        return self._thread

    # -- what Per is asked

    async def deliver(self, activity: Activity) -> Outcome:
        """Send one activity and return what came of it; whatever happens is an outcome.

        Only a cancellation of the calling task ends it otherwise. A request over a connection that was kept
        alive, and that ended before any answer, is sent once more at once. Per has usually not seen it,
        and may have counted it: but it would be sent again in any case, after a wait that is meant for
        outages, and of Per the end of an old connection says nothing.
        """
        try:
            return await self._send(activity, again=True)
        except (KeyboardInterrupt, SystemExit) as error:
            reason = f"the transport raised {type(error).__name__}"
        return Outcome(verdict=Verdict.NO_ANSWER, reason=reason)

    async def add(self, activity: Activity) -> Outcome:
        """Do as :meth:`deliver`, in a single request, and let a :class:`KeyboardInterrupt` pass."""
        return await self._send(activity, again=False)

    async def _send(self, activity: Activity, *, again: bool) -> Outcome:
        deadline = self._deadline()
        try:
            token = await self._token("activity_token", deadline)
            outcome = await self._add(activity, token, deadline, again=again)
            if outcome.verdict is Verdict.BAD_TOKEN:
                renewed = await self._token("activity_token", deadline)
                if renewed != token:  # rotated while the request was under way
                    outcome = await self._add(activity, renewed, deadline, again=again)
        except _TokenUnavailable as error:
            return Outcome(verdict=Verdict.BAD_TOKEN, reason=str(error))
        return outcome

    async def _add(self, activity: Activity, token: Secret, deadline: float, *, again: bool) -> Outcome:
        parameters = {
            "billingId": activity.billing_id,
            "userId": activity.user_id,
            "activityTypeId": activity.activity_type_id,
        }
        answer = await self._get("/activities.add", parameters, token, deadline, again=again)
        if isinstance(answer, str):
            return Outcome(verdict=Verdict.NO_ANSWER, reason=answer)
        outcome = interpret(
            answer.status,
            answer.headers,
            answer.body,
            self._clock.wall(),
            redact=lambda reason: redacted(reason, token, activity.billing_id, activity.user_id),
        )
        sent = outcome.transaction_id
        if sent is None or (stored := without_token(sent, token)) == sent:
            return outcome
        return outcome._replace(transaction_id=stored)  # Per repeats the token, which must not be stored

    async def report(self, period: dict[str, str]) -> Report:
        """Ask for a report; raise on anything that is not one."""
        deadline = self._deadline()
        unavailable = None
        try:
            token = await self._token("reporting_token", deadline)
        except _TokenUnavailable as error:
            unavailable = str(error)
        if unavailable is not None:  # raised here, not there: no context for a traceback to show
            raise AuthenticationError(unavailable)
        answer = await self._get("/reports.get", period, token, deadline, largest=_LARGEST_REPORT, again=True)
        if isinstance(answer, str):
            message = f"no report: {answer}"
            raise PerAPIError(message)
        report = self._report(answer, token)
        if isinstance(report, PerAPIError):
            raise report
        return report

    def _report(self, answer: _Answer, token: Secret) -> Report | PerAPIError:
        """Return what is to be returned, or raised; by whom no foreign text is held."""
        status, content = answer.status, parse_json(answer.body)
        said = reasons_of(content) if content else []
        code = presentable(redacted(said[0], token)) if said else None
        ok = content.get("ok") if content else None
        if status in (401, 403) or (ok is False and BAD_TOKEN_REASON in said):
            message = f"Per refused the reporting token (HTTP {status}, {code or 'no reason given'})"
            return AuthenticationError(message, status=status, code=code)
        wait = retry_after(answer.headers, self._clock.wall()) if status in (429, 503) else None
        if ok is not True and ok is not False:
            return PerAPIError(
                f"no report: HTTP {status}, not an answer of Per's", status=status, retry_after=wait
            )
        if ok is False or not 200 <= status < 300:
            message = f"no report: HTTP {status}, {code or 'no reason given'}"
            return PerAPIError(message, status=status, code=code, retry_after=wait)
        with suppress(KeyError, TypeError, AttributeError, ValueError):
            return Report((content or {})["result"], self._settings.activity_type_id)
        return PerAPIError(f"no report: HTTP {status}, ok, but its result is not a report", status=status)


def _check_encoding(headers: Headers) -> None:
    if headers.get("content-encoding", "identity").lower() != "identity":
        message = "compressed, though that was not asked for"
        raise NotHTTP(message)


async def _read(response: httpx.Response, largest: int) -> _Answer:
    """Read an answer's body, as much of it as an answer of Per's may have."""
    try:
        _check_encoding(response.headers)
        body = bytearray()
        # Not aiter_raw(), nor the stream itself: a mock's response may have been read already.
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > largest:
                message = f"more than {largest} bytes"
                raise NotHTTP(message)
    finally:
        await response.aclose()
    return _Answer(response.status_code, response.headers, bytes(body))
