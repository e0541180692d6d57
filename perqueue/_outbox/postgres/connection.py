"""Connections to the database, and the one seam at which psycopg's errors become ours.

No pool of psycopg_pool's: its threads do not survive a fork, it waits its whole timeout for a server that
refuses connections, and after an outage it tries again only when its own backoff has run out.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple, NoReturn, TypeAlias

from perqueue import _threads
from perqueue.exceptions import ConfigurationError, OutboxError

try:
    import psycopg
    from psycopg import errors, waiting
except ImportError as error:
    message = (
        "an outbox in PostgreSQL needs psycopg, which cannot be imported:"
        f" pip install 'useper-perqueue[postgres]' ({error})"
    )
    raise ConfigurationError(message) from error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg.abc import Params, PQGen

    from perqueue._address import DatabaseURL

PATIENCE = 1.0
"""Seconds after which a connection or an answer that has not come becomes an :class:`OutboxError`."""
SCAN_PATIENCE = 3.0
"""The same for what looks for the oldest, for a drain and for a program that starts.

While somebody's transaction stays open vacuum removes nothing, and all that was delivered is passed over.
"""
LONG_PATIENCE = 60.0
"""The same for whoever asks on somebody's command, and holds up nothing meanwhile."""
MOST_CONNECTIONS = 5
"""Connections of one process, beside the one of its drain: the server has a hundred, as a rule, for all."""
_CONNECT_TIMEOUT = 5
_POLL = 0.001
_VARIABLES = {
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "application_name": "PGAPPNAME",
    "gssencmode": "PGGSSENCMODE",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
"""What may say so, too (PostgreSQL's documentation, libpq, "Environment Variables"); text is always UTF-8."""
_ON_REQUEST = 2**31
"""Executions after which psycopg prepares a statement unasked; with None it would not even when asked to."""

MADE_ANEW = "Restart the program, which makes anew what is gone, and delivers what is left"
_RETRYING = "everything is kept, and it goes on by itself once the database answers"
_REMEDIES: dict[str, str] = {
    "08P01": "a pooler takes no ?options=: ALTER ROLE … SET search_path = … does the same for a user",
    "08001": "look at the outbox's URL, and at what it names",
    "08T": f"the server is slow, or cut off: {_RETRYING}; `perqueue doctor` says more",
    "08": f"the connection is lost: {_RETRYING}",
    "25006": "that server is a standby: name the primary, or several hosts",
    "28": "look at the user name, the password, and the server's pg_hba.conf",
    "3D": "create the database first: createdb",
    "3F": "create the schema first, or correct the search path",
    "42501": "grant this user the perqueue_ tables, and for the first start CREATE on the schema",
    "42P01": f"a table is missing: was it dropped? {MADE_ANEW}",
    "53100": "the server's disk is full: free space there, all goes on by itself",
    "53300": "the server takes no more connections: raise max_connections, or put a pooler before it",
    "55P03": "somebody holds a lock on a perqueue_ table: look at pg_locks",
    "57014": "the server cancelled it: its statement_timeout is too short, or it is overloaded",
    "57P": f"the server is shutting down or starting: {_RETRYING}",
}
_REFUSALS = {
    "too many": "53300",
    "connection slots": "53300",
    "no more connections": "53300",
    "authentication failed": "28",
    r"pg_hba\.conf": "28",
    'database ".*" does not exist': "3D",
    'role ".*" does not exist': "28",
    "no answer within": "08T",
    "is bad: (invalid|definition of service)|root certificate|not support SSL|unrecognized": "08001",
    "starting up": "57P",
    "shutting down": "57P",
    "startup parameter": "08P01",
}
"""What a server says that takes no connection: libpq does not tell its code."""

_abandoned: list[object] = []  # inherited through a fork: neither used nor closed here


class TimedOutError(psycopg.OperationalError):
    """The server did not answer in time."""


class Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which nothing waits longer than its patience: a cut network says nothing."""

    patience = PATIENCE
    is_pooled = False
    """Whether a pooler may hand each transaction to another server process: nothing outlives one there."""
    _cursor: psycopg.Cursor[tuple[Any, ...]]

    def wait(self, gen: PQGen[Any], interval: float = 0.1, timeout: float | None = None) -> Any:
        """Do as psycopg's, up to a deadline. Whatever ends it early leaves a connection in doubt: closed."""
        try:
            return waiting.wait(gen, self.pgconn.socket, interval, timeout or self.patience)
        except errors._WaitTimeout:  # noqa: SLF001 - what psycopg tells its callers to convert
            self.pgconn.finish()
            message = f"no answer within {timeout or self.patience:g} s"
            raise TimedOutError(message) from None
        except psycopg.Error:
            raise
        except BaseException:  # a signal handler's: nobody reads the rest of the answer any more
            self.pgconn.finish()
            raise

    def run(self, query: LiteralString, values: Params, *, prepare: bool, patience: float) -> list[Any]:
        """Run a statement and return its rows."""
        self.patience = patience
        try:
            cursor = self._cursor
        except AttributeError:
            cursor = self._cursor = self.cursor()
        try:
            cursor.execute(query, values, prepare=prepare)
            return [] if cursor.rownumber is None else cursor.fetchall()
        except psycopg.Error as error:
            if error.sqlstate == "25006":  # it was the primary, once
                self.close()
            raise

    def is_alive(self) -> bool:
        """Tell whether an idle connection still is one, without asking the server."""
        try:
            self.pgconn.consume_input()  # what the server said at last,
            self.pgconn.consume_input()  # and that it has hung up
        except psycopg.Error:
            return False
        return not self.closed


def outbox_error(url: DatabaseURL, error: psycopg.Error) -> OutboxError:
    """Turn an error of the database into ours, with the remedy in its text, and without the password."""
    code = error.sqlstate or ""
    if not code and isinstance(error, psycopg.OperationalError):
        code = next((code for words, code in _REFUSALS.items() if re.search(words, str(error))), "08")
    remedy = next((text for start, text in _REMEDIES.items() if code.startswith(start)), "")
    said = " ".join(url.redact(str(error)).split())
    return OutboxError(f"outbox {url}: {said}" + (f" ({remedy})" if remedy else ""))


@contextmanager
def database_errors(url: DatabaseURL) -> Iterator[None]:
    """Let no error of psycopg's out as it is."""
    try:
        yield
    except psycopg.Error as error:
        raise outbox_error(url, error) from None  # whose text may hold the password


class _Failure(NamedTuple):
    """Why there is no new connection, and since when (monotonic seconds)."""

    error: psycopg.Error
    at: float


_Place: TypeAlias = "_threads.SimpleQueue[Connection | _Failure]"
"""Where one that waits is given what it waits for."""


class Connections:
    """A few connections that threads share, opened when they are needed."""

    def __init__(self, url: DatabaseURL, most: int = MOST_CONNECTIONS) -> None:
        self._url = url
        self._most = most
        self.abandon()

    def abandon(self) -> None:
        """Be as new, in a forked child: the parent's connections are not touched, nor closed."""
        _abandoned.append(getattr(self, "_ready", None))
        self._pid = os.getpid()
        self._ready = deque[Connection]()
        self._line = deque[_Place]()  # else whoever gives one back would have it again before those who wait
        self._lock = _threads.RLock()
        self._open = 0
        self._closed = False

    def take(self, patience: float = PATIENCE) -> Connection:
        """Return a connection that nobody else uses; raise a psycopg error if there is none in time."""
        if self._pid != os.getpid():
            self._foreign()
        deadline = time.monotonic() + patience
        while True:
            found = self._next(deadline)
            if found is None:
                message = f"no connection within {patience:g} s"
                if self._open >= self._most:
                    message += f", and this process opens no more than {self._most}"
                raise TimedOutError(message)
            if isinstance(found, _Failure):
                if time.monotonic() - found.at < PATIENCE:  # else whoever asked for it has given up
                    raise found.error
            elif found.is_alive():
                return found
            else:
                self.give_up(found)

    def _next(self, deadline: float) -> Connection | _Failure | None:
        place: _Place = _threads.SimpleQueue()
        with self._lock:
            if self._ready:
                return self._ready.popleft()
            self._line.append(place)
        found = None
        try:
            self._open_another()
            found = self._wait(place, deadline)
        finally:
            with self._lock:
                if place in self._line:
                    self._line.remove(place)
                elif found is None:  # it came at the last moment
                    with suppress(_threads.Empty):
                        self._hand_on(place.get_nowait())
        return found

    def _wait(self, place: _Place, deadline: float) -> Connection | _Failure | None:
        while (left := deadline - time.monotonic()) > 0:
            with suppress(_threads.Empty):
                if not _threads.is_patched():
                    return place.get(timeout=left)
                return place.get_nowait()
            _threads.pause(_POLL)  # lets the greenlet go on that has the connection
        return None

    def _hand_on(self, found: Connection | _Failure) -> None:
        """Give it to whoever has waited longest; keep a connection for which nobody waits."""
        with self._lock:
            if self._line:
                self._line.popleft().put(found)
            elif not isinstance(found, _Failure):
                self._ready.append(found)

    def _open_another(self) -> None:
        with self._lock:
            if self._open >= self._most or self._closed:
                return
            self._open += 1
        # On a thread of its own: neither a look-up nor a host that does not answer keeps to any deadline.
        try:
            _threads.new_thread(self._connect, (), name="perqueue-connect").start()
        except RuntimeError:  # the interpreter is shutting down
            self._connect()

    def _connect(self) -> None:
        try:
            self.give_back(connect(self._url))
        except BaseException as error:  # noqa: BLE001 - whoever waits must hear of it
            if not isinstance(error, psycopg.Error):
                error = psycopg.OperationalError(f"{type(error).__name__}: {error}")
            with self._lock:
                self._open -= 1
            self._hand_on(_Failure(error, time.monotonic()))

    def give_back(self, connection: Connection) -> None:
        """Let others use a connection again, if it can be used."""
        if connection.closed or self._closed:
            self.give_up(connection)
        else:
            self._hand_on(connection)

    def give_up(self, connection: Connection) -> None:
        """Close a connection that is of no more use."""
        with self._lock:
            self._open -= 1
        with suppress(psycopg.Error):
            connection.close()

    def _foreign(self) -> NoReturn:
        message = (
            "this process was forked without Python's fork hooks (uWSGI forks in C), so the outbox cannot"
            " be used in it: create the PerQueue after the fork (uWSGI: lazy-apps = true, or @postfork)"
        )
        raise OutboxError(message)

    def close(self) -> None:
        """Close those that nobody uses; the others are closed when they are given back."""
        self._closed = True
        if self._pid != os.getpid():
            return
        with self._lock:
            while self._ready:
                self.give_up(self._ready.popleft())


def checked(url: DatabaseURL) -> DatabaseURL:
    """Return a URL that libpq can read; raise :class:`~perqueue.ConfigurationError` for any other."""
    try:
        psycopg.conninfo.conninfo_to_dict(url.dsn)
    except psycopg.ProgrammingError as error:
        message = f"outbox {url}: {url.redact(str(error)).strip()} (look at the outbox's URL)"
        raise ConfigurationError(message) from None  # whose text may hold the password
    return url


def connect(url: DatabaseURL) -> Connection:
    """Connect, with what makes a dead peer noticed unless the URL or a variable says otherwise."""
    given = psycopg.conninfo.conninfo_to_dict(url.dsn)
    wanted: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT,
        "keepalives_idle": 30,  # and so no firewall forgets the connection
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "application_name": "perqueue",
        "client_encoding": "UTF8",
        "gssencmode": "disable",
    }
    if "," in str(given.get("host") or os.environ.get("PGHOST", "")):
        wanted["target_session_attrs"] = "read-write"
    options = {
        name: value
        for name, value in wanted.items()
        if name not in given and not os.environ.get(_VARIABLES.get(name, ""))
    }
    connection = Connection.connect(url.dsn, autocommit=True, prepare_threshold=None, **options)
    try:
        # A pooler tells a number of its own, so that it is asked to cancel, not the server.
        (process,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
    except BaseException:
        connection.close()
        raise
    connection.is_pooled = process != connection.pgconn.backend_pid
    if not connection.is_pooled:  # there another program's statement may have the same name
        connection.prepare_threshold = _ON_REQUEST
    return connection
