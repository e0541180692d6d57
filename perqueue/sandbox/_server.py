"""`Sandbox`: a local Per, in a thread of its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

from perqueue.sandbox._app import App
from perqueue.sandbox._control import Control
from perqueue.sandbox._engine import Engine
from perqueue.sandbox._fault_book import FaultBook, When
from perqueue.sandbox._ledger import Ledger, ReceivedActivity, RequestSeen
from perqueue.sandbox._per import Per
from perqueue.sandbox._period import utc_now
from perqueue.sandbox._received import Received
from perqueue.sandbox._tokens import DEFAULT_TOKENS, check_tokens, first_with

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Collection, Iterable, Mapping
    from datetime import datetime

    from perqueue.sandbox._fault import Fault


class Sandbox(Received):
    """A local Per that follows Per's documented API, with faults on demand.

    Every method may be called from any thread; starting and stopping (also down and back) not from within
    a callback. A forked child inherits a stopped sandbox.

    :param host: the address to listen on.
    :param port: 0 takes a free one at the first start and keeps it.
    :param tokens: token -> scopes (``activity``, ``reporting``); by default one token for each.
    :param activity_types: the activity types that exist; None: any.
    :param latency: seconds before every answer of the API. An activity counts at its arrival, before them.
    :param clock: dates arrivals; returns aware datetimes in UTC.
    :param ssl_context: serve HTTPS with it.
    :param on_request: called for each request to the API, in the sandbox's thread: be quick.
    :param on_activity: called for each accepted activity, likewise.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: Mapping[str, Iterable[str]] | None = None,
        activity_types: Collection[str] | None = None,
        latency: float = 0.0,
        clock: Callable[[], datetime] = utc_now,
        ssl_context: ssl.SSLContext | None = None,
        on_request: Callable[[RequestSeen], None] | None = None,
        on_activity: Callable[[ReceivedActivity], None] | None = None,
    ) -> None:
        if not 0 <= latency < math.inf:
            raise ValueError(f"latency must be at least 0 seconds and finite, not {latency!r}")
        if clock().tzinfo is None:
            raise ValueError("clock must return aware datetimes")
        scopes = check_tokens(DEFAULT_TOKENS if tokens is None else tokens)
        self._activity_token = first_with(scopes, "activity")
        self._reporting_token = first_with(scopes, "reporting")
        types = None if activity_types is None else tuple(activity_types)
        self._activity_type_id = types[0] if types else "sandbox-activity-type"
        self._scheme = "http" if ssl_context is None else "https"
        super().__init__(Ledger())
        self._faults = FaultBook()
        self._per = Per(ledger=self._ledger, tokens=scopes, activity_types=types, clock=clock)
        self._app = App(
            per=self._per,
            ledger=self._ledger,
            faults=self._faults,
            latency=latency,
            control=Control(self),
            on_request=on_request,
            on_activity=on_activity,
        )
        self._engine = Engine(
            self._app, host=host, port=port, ssl_context=ssl_context, on_fork=self._renew_locks
        )

    def __repr__(self) -> str:
        return f"<Sandbox on port {self._engine.port}, {self._engine.state}, {self.accepted} accepted>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- Running ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Return once it listens. Does nothing if it does already; also restarts, on the same port."""
        self._engine.start()

    def stop(self) -> None:
        """Close every socket and end the thread, at once; requests under way get no answer.

        What was received is kept, for a look afterwards. Does nothing if it is stopped.
        """
        self._engine.stop()

    def go_down(self) -> None:
        """Drop all connections and refuse new ones, until `come_back()`."""
        self._engine.go_down()

    def come_back(self) -> None:
        """Listen again, on the same port."""
        self._engine.come_back()

    # --- How to reach it ----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """The base URL, such as `http://127.0.0.1:40123`; known from the first start on."""
        if not self._engine.port:
            raise RuntimeError("the sandbox was never started: its port is not known yet")
        host = f"[{self._engine.host}]" if ":" in self._engine.host else self._engine.host
        return f"{self._scheme}://{host}:{self._engine.port}"

    @property
    def activity_token(self) -> str:
        """The first token given with the scope `activity`; stays, whatever `set_tokens()` does."""
        return self._activity_token

    @property
    def reporting_token(self) -> str:
        """The first token given with the scope `reporting`; stays, whatever `set_tokens()` does."""
        return self._reporting_token

    @property
    def activity_type_id(self) -> str:
        """An activity type to use: any other is accepted too, unless `activity_types` restricts it."""
        return self._activity_type_id

    @property
    def tokens(self) -> Mapping[str, frozenset[str]]:
        """Token -> scopes, as they are now."""
        return self._per.tokens

    def set_tokens(self, tokens: Mapping[str, Iterable[str]]) -> None:
        """Replace all tokens; those not named are bad from now on."""
        self._per.tokens = check_tokens(tokens)

    def state(self) -> Mapping[str, Any]:
        """Return counts and the faults in force, as JSON-able values."""
        return {
            "url": self.url,
            "requests": self.requests,
            "accepted": self.accepted,
            "max_concurrent": self.max_concurrent,
            "faults": self._faults.describe(),
        }

    # --- Faults ---------------------------------------------------------------------------------------

    def set_fault(
        self,
        fault: Fault,
        *,
        times: int | None = None,
        when: When | None = None,
        endpoint: str = "activities.add",
    ) -> None:
        """Let requests meet a fault.

        Tried first are faults with `when`, then those with `times`, each in the order in which they were
        set; last the one without either, of which an endpoint has only one: a new one replaces it.

        :param fault: what happens.
        :param times: to how many requests it happens; None: to all, until ``clear_faults()``.
        :param when: only to activities for which this returns true; it gets ``billing_id``, ``user_id`` and
            ``activity_type_id``, and runs in the sandbox's thread.
        :param endpoint: ``activities.add``, ``reports.get`` or ``both``.

        Raises ``ValueError`` if ``times`` is below 1, there is no such endpoint, or ``when`` is for reports.
        """
        self._faults.add(fault, times=times, when=when, endpoint=endpoint)

    def clear_faults(self) -> None:
        """End all faults for requests to come; those that hang go on hanging until `release()`."""
        self._faults.clear()

    def release(self) -> None:
        """Let the requests that hang now go on."""
        self._engine.soon(self._app.release)

    def reset(self) -> None:
        """Forget activities, requests and faults, and release what hangs; tokens stay."""
        self._faults.clear()
        self.release()
        self._ledger.forget()

    def _renew_locks(self) -> None:
        self._ledger.renew_lock()
        self._faults.renew_lock()
