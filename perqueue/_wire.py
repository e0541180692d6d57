"""Per on the wire: one HTTP request at a time, and what became of it.

httpx's transports are used without its client on top, which leaves out what must not happen here:
redirects, cookies, settings from the environment, and a log line at INFO with the whole URL.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from perqueue._activity import Activity, Outcome, Verdict
from perqueue._answers import BAD_TOKEN_REASON, interpret, parse_json, presentable, reason_of
from perqueue._clock import SYSTEM_CLOCK
from perqueue._report import Report
from perqueue._settings import ClientSettings, checked_token
from perqueue._version import __version__
from perqueue.exceptions import AuthenticationError, ConfigurationError, PerAPIError

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Mapping

    import httpx

    from perqueue._clock import Clock
    from perqueue._settings import Token

_SHORTEST_SECRET = 8
"""Shorter tokens (a test's "x") are taken out as whole words only, or they would spoil every text."""
_LARGEST_ANSWER = 64 * 1024
_LARGEST_REPORT = 64 * 1024 * 1024


class _TokenUnavailable(Exception):
    """The token's callable failed, or returned something that is no token."""


class _NotPer(Exception):
    """An answer that cannot be Per's: too large, or in an encoding that was not asked for."""


def _redacted(text: str, token: str, *ids: str) -> str:
    """Return a foreign text fit to be logged and raised: without the token and the IDs that it may repeat."""
    if len(token) >= _SHORTEST_SECRET:
        text = text.replace(token, "[token]")
    else:
        text = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", "[token]", text)
    for form in {form for value in ids for form in (value, quote(value, safe=""))}:
        # Whole words only: an ID may be as short as "a".
        text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "…", text)
    return text


class Wire:
    """Sends single requests to Per, over connections that are kept alive and never shared by two requests."""

    def __init__(self, settings: ClientSettings, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._clock = clock
        self._ssl: ssl.SSLContext | None = None
        self.forget_connections()

    def forget_connections(self) -> None:
        """Abandon every connection without touching it, in a forked child for instance."""
        # Last in, first out: the connections that are not needed age, and Per or a proxy ends them.
        self._idle: list[httpx.AsyncBaseTransport] = []

    async def aclose(self) -> None:
        """Close the connections, not a transport that was given."""
        idle, self._idle = self._idle, []
        for transport in idle:
            with suppress(Exception):
                await transport.aclose()

    @asynccontextmanager
    async def _transport(self) -> AsyncIterator[httpx.AsyncBaseTransport]:
        """Lend a transport with one connection of its own; it is kept only if all went well."""
        # One for each request in flight: httpx's shared pool costs a time that grows with the square of
        # the requests in flight (encode/httpx#3215).
        if self._settings.transport is not None:
            yield self._settings.transport
            return
        transport = self._idle.pop() if self._idle else self._new_transport()
        try:
            yield transport
        except BaseException:
            with suppress(Exception):
                await transport.aclose()
            raise
        self._idle.append(transport)

    def _new_transport(self) -> httpx.AsyncBaseTransport:
        import httpx

        if self._ssl is None:
            verify = self._settings.verify
            self._ssl = httpx.create_ssl_context(verify=verify, trust_env=False)
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=30)
        return httpx.AsyncHTTPTransport(
            verify=self._ssl, trust_env=False, proxy=self._settings.proxy, limits=limits
        )

    async def get(
        self, path: str, parameters: Mapping[str, str], token: str, largest: int
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Send one GET and return status, headers and body.

        The request's time is bounded as a whole, from connecting to the last byte, by ``request_timeout``.
        Raises :class:`TimeoutError`, ``_NotPer`` and whatever the transport raises.
        """
        import httpx

        query = urlencode(parameters, quote_via=quote, safe="")
        url = f"{self._settings.base_url}{path}" + (f"?{query}" if query else "")
        request = httpx.Request(
            "GET",
            url,
            headers={
                "Authorization": f"Bearer {token}",
                "User-Agent": f"useper-perqueue/{__version__}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                # activities.add is a GET that changes things: no cache may answer it.
                "Cache-Control": "no-store",
            },
        )
        async with asyncio.timeout(self._settings.request_timeout), self._transport() as transport:
            response = await transport.handle_async_request(request)
            try:
                if response.headers.get("content-encoding", "identity").lower() != "identity":
                    message = "compressed, though that was not asked for"
                    raise _NotPer(message)
                body = bytearray()
                # Not aiter_raw(), nor the stream itself: a mock's response may have been read already.
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > largest:
                        message = f"more than {largest} bytes"
                        raise _NotPer(message)
            finally:
                await response.aclose()
        return response.status_code, response.headers, bytes(body)

    def token(self, which: str) -> str:
        """Return the token, from its callable if it is one."""
        token: Token | None = getattr(self._settings, which)
        if token is None:
            message = f"{which} is missing: pass it or set PER_{which.upper()}"
            raise ConfigurationError(message)
        if not callable(token):
            return token
        try:
            return checked_token(which, token())
        except ConfigurationError as error:
            raise _TokenUnavailable(str(error)) from None
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code
            message = f"the {which} callable raised {type(error).__name__}"
            raise _TokenUnavailable(message) from None

    async def deliver(self, activity: Activity) -> Outcome:
        """Send one activity and return what came of it; whatever happens is an outcome."""
        try:
            token = self.token("activity_token")
            outcome = await self._add(activity, token)
            if outcome.verdict is Verdict.BAD_TOKEN:
                renewed = self.token("activity_token")
                if renewed != token:  # rotated while the request was under way
                    outcome = await self._add(activity, renewed)
        except _TokenUnavailable as error:
            return Outcome(verdict=Verdict.BAD_TOKEN, reason=str(error))
        return outcome

    async def _add(self, activity: Activity, token: str) -> Outcome:
        parameters = {
            "billingId": activity.billing_id,
            "userId": activity.user_id,
            "activityTypeId": activity.activity_type_id,
        }
        try:
            status, headers, body = await self.get("/activities.add", parameters, token, _LARGEST_ANSWER)
        except Exception as error:  # noqa: BLE001 - the map is total: what is not an answer stays pending
            reason = self._describe(error, token, activity.billing_id, activity.user_id)
            return Outcome(verdict=Verdict.NO_ANSWER, reason=reason)
        return interpret(
            status,
            headers,
            body,
            self._clock.wall(),
            redact=lambda reason: _redacted(reason, token, activity.billing_id, activity.user_id),
        )

    def _describe(self, error: Exception, token: str, *ids: str) -> str:
        """Say what went wrong, without anything secret."""
        if isinstance(error, TimeoutError):
            return f"no answer within {self._settings.request_timeout:g} s"
        if isinstance(error, _NotPer):
            return f"not an answer of Per's: {error}"
        text = presentable(_redacted(str(error), token, *ids))
        # A malformed header's error quotes it in full.
        name = type(error).__name__
        return name if not text or name in ("LocalProtocolError", "UnicodeEncodeError") else f"{name}: {text}"

    async def report(self, period: dict[str, str]) -> Report:
        """Ask for a report; raise on anything that is not one."""
        try:
            token = self.token("reporting_token")
        except _TokenUnavailable as error:
            raise AuthenticationError(str(error)) from None
        try:
            status, _, body = await self.get("/reports.get", period, token, _LARGEST_REPORT)
        except Exception as error:  # noqa: BLE001 - no error of the transport passes the public door
            message = f"no report: {self._describe(error, token)}"
            raise PerAPIError(message) from None
        answer = parse_json(body)
        words = reason_of(answer) if answer else None
        code = presentable(_redacted(words, token)) if words else None
        ok = answer.get("ok") if answer else None
        if status in (401, 403) or (ok is False and words == BAD_TOKEN_REASON):
            message = f"Per refused the reporting token (HTTP {status}, {code or 'no reason given'})"
            raise AuthenticationError(message, status=status, code=code)
        if ok is not True and ok is not False:
            message = f"no report: HTTP {status}, not an answer of Per's"
            raise PerAPIError(message, status=status)
        if ok is False or not 200 <= status < 300:
            message = f"no report: HTTP {status}, {code or 'no reason given'}"
            raise PerAPIError(message, status=status, code=code)
        try:
            return Report((answer or {})["result"], self._settings.activity_type_id)
        except (KeyError, TypeError, AttributeError, ValueError):
            message = f"no report: HTTP {status}, ok, but its result is not a report"
            raise PerAPIError(message, status=status) from None
