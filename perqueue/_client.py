"""The bare API: one HTTP request for each call, without an outbox."""

from __future__ import annotations

import weakref
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from perqueue._activity import Activity, Verdict, checked_id
from perqueue._clock import SYSTEM_CLOCK
from perqueue._report import Report, report_period
from perqueue._settings import ClientSettings, resolve_client_settings
from perqueue.exceptions import (
    ActivityRejected,
    AuthenticationError,
    InvalidActivity,
    PerAPIError,
    QueueClosed,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Coroutine
    from datetime import datetime
    from types import TracebackType
    from typing import Self, Unpack

    import httpx

    from perqueue._settings import Token

T = TypeVar("T")
_CLOSING = 1.0
"""Seconds that close() waits for requests that it has cancelled."""


class ClientOptions(TypedDict, total=False):
    """The options of the bare clients; what they mean stands at :class:`perqueue.PerQueue`."""

    activity_token: Token | None
    reporting_token: Token | None
    activity_type_id: str | None
    base_url: str | None
    request_timeout: float
    proxy: httpx.Proxy | httpx.URL | str | None
    verify: ssl.SSLContext | bool
    transport: httpx.AsyncBaseTransport | None


class AsyncPerClient:
    """Per's API for asyncio: one request for each call, no outbox, no retry.

    Options as for :class:`perqueue.PerQueue`. Use it within one event loop, and close it.

    >>> async with AsyncPerClient(activity_token="…") as per:  # doctest: +SKIP
    ...     transaction_id = await per.add_activity("GROUP_A", "USER_1", "ACTIVITY_TYPE_ID")
    """

    def __init__(
        self,
        *,
        activity_token: Token | None = None,
        reporting_token: Token | None = None,
        activity_type_id: str | None = None,
        base_url: str | None = None,
        request_timeout: float = 10.0,
        proxy: httpx.Proxy | httpx.URL | str | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._settings = resolve_client_settings(
            activity_token=activity_token,
            reporting_token=reporting_token,
            activity_type_id=activity_type_id,
            base_url=base_url,
            request_timeout=request_timeout,
            proxy=proxy,
            verify=verify,
            transport=transport,
        )
        from perqueue._wire.exchange import Wire

        self._wire = Wire(self._settings)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._settings.base_url}>"

    async def add_activity(self, billing_id: str, user_id: str, activity_type_id: str | None = None) -> str:
        """Tell Per that a user is active now, and return the transaction ID.

        Raises :class:`~perqueue.InvalidActivity`, :class:`~perqueue.ActivityRejected`,
        :class:`~perqueue.AuthenticationError`, or :class:`~perqueue.PerAPIError` for everything else,
        a timeout included: the activity may have counted all the same.
        """
        kind = activity_type_id if activity_type_id is not None else self._settings.activity_type_id
        if kind is None:
            message = "activity_type_id is missing: pass it, or set PER_ACTIVITY_TYPE_ID"
            raise InvalidActivity(message)
        activity = Activity(
            id=0,
            billing_id=checked_id("billing_id", billing_id),
            user_id=checked_id("user_id", user_id),
            activity_type_id=checked_id("activity_type_id", kind),
            recorded_at=SYSTEM_CLOCK.time_ms(),
        )
        outcome = await self._wire.add(activity)
        if outcome.verdict is Verdict.ACCEPTED:
            return outcome.transaction_id or ""
        reason = outcome.reason
        if outcome.verdict is Verdict.REJECTED:
            message = f"Per refused the activity: {reason}"
            raise ActivityRejected(message, reason=reason, activities=(activity,))
        if outcome.verdict is Verdict.BAD_TOKEN:
            message = f"Per refused the activity token ({reason})"
            raise AuthenticationError(message, status=outcome.status, code=reason)
        message = f"no transaction ID: {reason}"
        raise PerAPIError(
            message,
            status=outcome.status,
            code=reason if outcome.status else None,
            retry_after=outcome.retry_after,
        )

    async def get_report(
        self, start: datetime | str | None = None, end: datetime | str | None = None
    ) -> Report:
        """Return Per's usage report.

        ``start`` and ``end`` are aware datetimes or ISO 8601 strings with a time zone. Neither: the whole
        prior calendar month; ``start`` alone: until now (Per's documentation, "Reporting"). Raises
        :class:`~perqueue.ConfigurationError` for dates, :class:`~perqueue.AuthenticationError`, or
        :class:`~perqueue.PerAPIError` for everything else.
        """
        return await self._wire.report(report_period(start, end))

    def _forget_connections(self) -> None:
        self._wire.forget_connections()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._wire.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class PerClient:
    """Per's API, synchronously: one request for each call, no outbox, no retry.

    Options as for :class:`perqueue.PerQueue`. Safe to share between threads.

    >>> with PerClient(reporting_token="…") as per:  # doctest: +SKIP
    ...     print(per.get_report().unique("GROUP_A", "ACTIVITY_TYPE_ID"))
    """

    def __init__(self, **options: Unpack[ClientOptions]) -> None:
        self._client = AsyncPerClient(**options)
        from perqueue._background import Background

        self._background = Background("perqueue-client")
        weakref.finalize(self, self._background.close).atexit = False

    def __repr__(self) -> str:
        return repr(self._client).replace("AsyncPerClient", "PerClient")

    def add_activity(self, billing_id: str, user_id: str, activity_type_id: str | None = None) -> str:
        """Tell Per that a user is active now, and return the transaction ID.

        See :meth:`AsyncPerClient.add_activity`.
        """
        return self._run(lambda: self._client.add_activity(billing_id, user_id, activity_type_id))

    def get_report(self, start: datetime | str | None = None, end: datetime | str | None = None) -> Report:
        """Return Per's usage report; see :meth:`AsyncPerClient.get_report`."""
        report_period(start, end)  # a wrong date needs no thread to be told
        return self._run(lambda: self._client.get_report(start, end))

    def _run(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        self._background.adopt(self._client._forget_connections)  # noqa: SLF001
        return self._background.run(call, self._client.aclose)

    def close(self) -> None:
        """Close the connections, and end what other threads are asking; idempotent, from any thread."""
        self._background.close(wait=_CLOSING)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Reporter:
    """Gets the reports of a queue, with the queue's own options."""

    def __init__(self, settings: ClientSettings) -> None:
        self._options = {field.name: getattr(settings, field.name) for field in fields(ClientSettings)}
        self._clients: dict[str, PerClient] = {}
        self._closed = False

    def get_report(self, start: datetime | str | None, end: datetime | str | None) -> Report:
        """See :meth:`AsyncPerClient.get_report`."""
        self._not_closed()
        client = self._clients.get("shared")
        if client is None:  # of several threads at once, one's is used by all: setdefault() is atomic
            client = self._clients.setdefault("shared", PerClient(**self._options))
        return client.get_report(start, end)

    async def aget_report(self, start: datetime | str | None, end: datetime | str | None) -> Report:
        """See :meth:`AsyncPerClient.get_report`."""
        self._not_closed()
        async with AsyncPerClient(**self._options) as client:
            return await client.get_report(start, end)

    def _not_closed(self) -> None:
        if self._closed:
            message = "the queue is closed"
            raise QueueClosed(message)

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        for client in list(self._clients.values()):
            client.close()
