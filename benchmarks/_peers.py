"""What else a program could call: other SDKs and queues, and SQLite by hand. None of them sends anything.

Each peer is a context manager over an empty folder that gives a function to call with a growing number.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import sqlite3
import threading
from typing import TYPE_CHECKING, Any

from perqueue import PerQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    Call = Callable[[int], object]
    Peer = Callable[[Path], AbstractContextManager[Call]]

GROUP, TYPE = "GROUP_A", "PREMIUM_DOWNLOAD"
_EVENT = "Activity recorded"
_AT = 1_700_000_000_000


def _event(number: int) -> dict[str, str]:
    return {"billing_id": GROUP, "user_id": f"USER_{number}", "activity_type_id": TYPE}


# -- in memory


@contextlib.contextmanager
def queue_put(_: Path) -> Iterator[Call]:
    """Put into a ``queue.Queue``."""
    lines: queue.Queue[tuple[str, str, str]] = queue.Queue()
    yield lambda number: lines.put((GROUP, f"USER_{number}", TYPE))


@contextlib.contextmanager
def opentelemetry_log(_: Path) -> Iterator[Call]:
    """Emit a log record into OpenTelemetry's batch processor, with its defaults."""
    from opentelemetry._logs import LogRecord
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import (
        BatchLogRecordProcessor,
        LogRecordExporter,
        LogRecordExportResult,
    )

    class Nowhere(LogRecordExporter):
        def export(self, batch: Any) -> Any:
            del batch
            return LogRecordExportResult.SUCCESS

        def shutdown(self) -> None:
            pass

        def force_flush(self, timeout_millis: int = 0) -> bool:
            return bool(timeout_millis)

    provider = LoggerProvider()
    provider.add_log_record_processor(BatchLogRecordProcessor(Nowhere()))
    logger = provider.get_logger("benchmark")
    yield lambda number: logger.emit(LogRecord(body=_EVENT, attributes=_event(number)))
    provider.shutdown()


@contextlib.contextmanager
def opentelemetry_span(_: Path) -> Iterator[Call]:
    """Start and end a span, into OpenTelemetry's batch processor."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> Any:
            del spans
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(Nowhere()))
    tracer = provider.get_tracer("benchmark")
    yield lambda number: tracer.start_span(_EVENT, attributes=_event(number)).end()
    provider.shutdown()


@contextlib.contextmanager
def segment(_: Path) -> Iterator[Call]:
    """Track with Segment, whose consumer thread drops its batches."""
    from segment.analytics.client import Client
    from segment.analytics.consumer import Consumer

    Consumer.request = lambda _, __: None
    logging.disable()  # it complains of each event for which its queue is too full
    client = Client("benchmark")
    yield lambda number: client.track(f"USER_{number}", _EVENT, _event(number))
    client.shutdown()


@contextlib.contextmanager
def posthog(_: Path) -> Iterator[Call]:
    """Capture with PostHog, whose consumer thread drops its batches."""
    from posthog.client import Client
    from posthog.consumer import Consumer

    Consumer.request = lambda _, __: None
    logging.disable()
    client = Client("benchmark", host="http://127.0.0.1:9")
    yield lambda number: client.capture(_EVENT, distinct_id=f"USER_{number}", properties=_event(number))
    client.shutdown()


@contextlib.contextmanager
def sentry(_: Path) -> Iterator[Call]:
    """Capture a message with Sentry, whose transport drops it."""
    import sentry_sdk

    class Nowhere(sentry_sdk.transport.Transport):
        def capture_envelope(self, envelope: object) -> None:
            pass

    sentry_sdk.init(
        "http://key@127.0.0.1:9/1",
        transport=Nowhere,
        default_integrations=False,
        auto_enabling_integrations=False,
    )
    yield lambda number: sentry_sdk.capture_message(f"{_EVENT}: USER_{number}")


# -- queues on disk


@contextlib.contextmanager
def localqueue(folder: Path) -> Iterator[Call]:
    """Put into localqueue, in its relaxed mode."""
    from localqueue import DurabilityMode, SimpleQueue

    lines: Any = SimpleQueue(str(folder), durability=DurabilityMode.RELAXED)
    yield lambda number: lines.put(_event(number))
    lines.close()


@contextlib.contextmanager
def litequeue(folder: Path) -> Iterator[Call]:
    """Put into litequeue."""
    from litequeue import LiteQueue

    lines = LiteQueue(folder / "queue.db")
    yield lambda number: lines.put(f'{{"billing_id": "{GROUP}", "user_id": "USER_{number}"}}')
    lines.close()


@contextlib.contextmanager
def honker(folder: Path) -> Iterator[Call]:
    """Enqueue into honker."""
    from honker import open as open_queue

    lines = open_queue(str(folder / "queue.db")).queue("activities")
    yield lambda number: lines.enqueue(_event(number))


@contextlib.contextmanager
def diskcache(folder: Path) -> Iterator[Call]:
    """Append to a Deque of diskcache."""
    from diskcache import Deque

    lines = Deque(directory=str(folder))
    yield lambda number: lines.append((GROUP, f"USER_{number}", TYPE))
    lines.cache.close()


@contextlib.contextmanager
def persist_queue(folder: Path) -> Iterator[Call]:
    """Put into persist-queue's SQLiteAckQueue."""
    from persistqueue import SQLiteAckQueue

    lines = SQLiteAckQueue(str(folder), multithreading=True)
    yield lambda number: lines.put(_event(number))
    lines.close()


@contextlib.contextmanager
def huey(folder: Path) -> Iterator[Call]:
    """Enqueue a task with huey's SqliteHuey."""
    from huey import SqliteHuey

    app = SqliteHuey(filename=str(folder / "queue.db"))

    @app.task()  # type: ignore[untyped-decorator,unused-ignore]
    def deliver(billing_id: str, user_id: str, kind: str) -> None:
        pass

    yield lambda number: deliver(GROUP, f"USER_{number}", TYPE)
    app.storage.close()


# -- floors


_PLAIN = "id INTEGER PRIMARY KEY, billing_id TEXT, user_id TEXT, activity_type_id TEXT, recorded_at INTEGER"


def _connect(path: Path, page_size: int, synchronous: str, timeout: float = 0.0) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=timeout, check_same_thread=False)
    connection.execute(f"PRAGMA page_size = {page_size}")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(f"PRAGMA synchronous = {synchronous}")
    return connection


def _insert(connection: sqlite3.Connection) -> Call:
    statement = (
        "INSERT INTO activity (billing_id, user_id, activity_type_id, recorded_at) VALUES (?, ?, ?, ?)"
    )
    lock = threading.RLock()

    def insert(number: int) -> None:
        with lock:
            connection.execute(statement, (GROUP, f"USER_{number}", TYPE, _AT))

    return insert


@contextlib.contextmanager
def bare(folder: Path, synchronous: str = "NORMAL") -> Iterator[Call]:
    """Insert one row with sqlite3: WAL, one connection and one lock."""
    connection = _connect(folder / "bare.db", 4096, synchronous, timeout=5.0)
    connection.execute(f"CREATE TABLE IF NOT EXISTS activity ({_PLAIN})")
    yield _insert(connection)
    connection.close()


@contextlib.contextmanager
def tuned(folder: Path, synchronous: str = "NORMAL") -> Iterator[Call]:
    """Insert one row with small pages, while another thread checkpoints every 25 ms."""
    path = folder / "tuned.db"
    connection = _connect(path, 1024, synchronous)
    connection.execute(f"CREATE TABLE activity ({_PLAIN})")
    connection.execute("PRAGMA wal_autocheckpoint = 0")
    stopping = threading.Event()

    def checkpoint() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as beside:
            while not stopping.wait(0.025):
                beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    thread = threading.Thread(target=checkpoint)
    thread.start()
    try:
        yield _insert(connection)
    finally:
        stopping.set()
        thread.join()
        connection.close()


@contextlib.contextmanager
def queue_table(folder: Path) -> Iterator[Call]:
    """Insert one row into the table that one would first think of."""
    connection = _connect(folder / "queue.db", 4096, "NORMAL")
    connection.execute(
        "CREATE TABLE activity (id INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT UNIQUE,"
        " status TEXT DEFAULT 'pending', billing_id, user_id, activity_type_id, recorded_at)"
    )
    connection.execute("CREATE INDEX activity_status ON activity (status)")
    columns = "uuid, billing_id, user_id, activity_type_id, recorded_at"
    statement = f"INSERT INTO activity ({columns}) VALUES (?, ?, ?, ?, ?)"
    lock = threading.RLock()

    def insert(number: int) -> None:
        with lock:
            unique = os.urandom(16).hex()
            connection.execute(statement, (unique, GROUP, f"USER_{number}", TYPE, _AT))

    yield insert
    connection.close()


@contextlib.contextmanager
def append_file(folder: Path, *, sync: bool = False) -> Iterator[Call]:
    """Append one line to a file."""
    descriptor = os.open(folder / "activities.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

    def append(number: int) -> None:
        os.write(descriptor, f"{GROUP}\0USER_{number}\0{TYPE}\0{_AT}\n".encode())
        if sync:
            os.fdatasync(descriptor)

    yield append
    os.close(descriptor)


@contextlib.contextmanager
def fdatasync(folder: Path) -> Iterator[Call]:
    """Append as much as a commit does to a log, and sync it: what the disk itself costs."""
    descriptor = os.open(folder / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    page = bytes(1024 + 24)

    def append(_: int) -> None:
        os.write(descriptor, page)
        os.fdatasync(descriptor)

    yield append
    os.close(descriptor)


@contextlib.contextmanager
def perqueue(folder: Path, **options: Any) -> Iterator[Call]:
    """Record with perqueue, which delivers nothing meanwhile unless told."""
    options = {"drain": False, "base_url": "http://127.0.0.1:9", **options}
    with contextlib.closing(PerQueue(folder / "perqueue.db", activity_type_id=TYPE, **options)) as ours:
        yield lambda number: ours.record(GROUP, f"USER_{number}")


BUSY = "bare insert, SQLite's busy handler"
SHARED: dict[str, Peer] = {BUSY: bare, "perqueue record()": perqueue}
"""What several processes can use at once."""

NOTHING, KILL, POWER = "nothing", "kill -9", "power cut"

PEERS: dict[str, tuple[Peer, str]] = {
    "tuned insert": (tuned, KILL),
    "perqueue record()": (perqueue, KILL),
    "queue.Queue.put": (queue_put, NOTHING),
    "append-only file": (append_file, KILL),
    "bare insert, WAL + NORMAL": (bare, KILL),
    "OpenTelemetry log, batch": (opentelemetry_log, NOTHING),
    "OpenTelemetry span, batch": (opentelemetry_span, NOTHING),
    "Segment track": (segment, NOTHING),
    "PostHog capture": (posthog, NOTHING),
    "Sentry capture_message": (sentry, NOTHING),
    "AUTOINCREMENT, status index, uuid": (queue_table, KILL),
    "localqueue, relaxed": (localqueue, KILL),
    "litequeue": (litequeue, KILL),
    "honker": (honker, KILL),
    "diskcache Deque": (diskcache, KILL),
    "persist-queue SQLiteAckQueue": (persist_queue, KILL),
    "huey SqliteHuey": (huey, KILL),
    "append-only file, fdatasync": (functools.partial(append_file, sync=True), POWER),
    "bare insert, WAL + FULL": (functools.partial(bare, synchronous="FULL"), POWER),
    "perqueue record(), durability='power'": (functools.partial(perqueue, durability="power"), POWER),
}
"""What is measured beside ``record()``, and what an event survives once the call has returned."""
