"""Through pgbouncer in transaction mode, where nothing outlives a transaction: statements, LISTEN, locks."""

import threading
import time
from contextlib import suppress

import pytest

from perqueue import OutboxError
from tests.helpers import repeats, until, users
from tests.postgres.pooler import Pooler


class Busy:
    """A server process behind the pooler that is in a transaction."""

    def __init__(self, url):
        import psycopg

        self._connection = psycopg.connect(url)
        self._connection.execute("SELECT 1")

    def __enter__(self):
        return self._connection

    def __exit__(self, *_):
        self._connection.commit()
        self._connection.close()


@pytest.fixture
def pooler(database, outbox):
    """A pooler whose server processes begin in the test's schema."""
    with Pooler(database, outbox.rpartition("%3D")[2]) as pooler:
        yield pooler


def test_everything_works_through_a_pooler(per, make_queue, pooler, sql):
    """Threads record, drainers deliver, and each activity arrives once, on whatever server processes."""
    queues = [make_queue(pooler.url) for _ in range(2)]
    failures = []

    def record(name):
        try:
            for number in range(50):
                queues[number % 2].record("GROUP", f"{name}_{number}")
        except OutboxError as error:
            failures.append(error)

    threads = [threading.Thread(target=record, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    queues[0].flush(30)
    assert failures == []
    assert (per.unique("GROUP"), repeats(per)) == (200, 0)
    assert sql("SELECT count(*) FROM perqueue_activity_log WHERE state = 'accepted'") == [(200,)]


def test_coalescing_and_pruning_work_through_a_pooler(per, make_queue, pooler):
    """What takes locks in the database takes them for one transaction, and so keeps to them here."""
    from datetime import timedelta

    queue = make_queue(pooler.url, coalesce=timedelta(hours=24))
    receipts = [queue.record("GROUP", "USER") for _ in range(20)]
    assert len({receipt.wait(10) for receipt in receipts}) == 1
    assert queue._outbox.prune(0, 10, 10) is False
    assert per.accepted == 1


@pytest.mark.parametrize("named", [False, True])
def test_a_statement_of_another_program_is_never_run_instead(make_queue, pooler, sql, monkeypatch, named):
    """Another program's prepared statement of the same name gets none of what is recorded; a connection
    that took the pooler for a server would lose it there, without any error.
    """
    monkeypatch.setattr("perqueue._outbox.postgres.outbox._NOTIFY_INTERVAL", 0.0)  # one statement for all
    sql("CREATE TABLE other (a text, b text, c text, d bigint, e text, id bigint DEFAULT 7)")
    queue = make_queue(pooler.url, drain=False)
    connection = queue._outbox._shared.take()
    assert connection.is_pooled
    if named:
        connection.prepare_threshold = 1_000
    queue._outbox._shared.give_back(connection)
    with Busy(pooler.url) as first, Busy(pooler.url) as second:
        queue.record("GROUP", "FIRST")  # on the third server process
        for other in (first, second):
            other.execute(
                "PREPARE _pg3_0 (text, text, text, bigint, text) AS"
                " INSERT INTO other VALUES ($1, $2, $3, $4, $5) RETURNING id"
            )
    for number in range(30):
        with suppress(OutboxError):
            queue.record("GROUP", f"USER_{number}")
    lost = sql("SELECT count(*) FROM other")[0][0]
    assert (lost > 0) is named
    assert queue.stats().pending == 31 - lost


@pytest.mark.usefixtures("quick_leases")
def test_without_listen_a_drainer_looks_every_second(per, make_queue, pooler, monkeypatch):
    """A sleeping drainer behind a pooler finds what another process records by itself, in time."""
    from perqueue._outbox.postgres import leases

    monkeypatch.setattr(leases, "_AWAKE", 0.2)
    monkeypatch.setattr(leases, "_LOOK_ASLEEP", 60.0)
    drainer, recorder = make_queue(pooler.url), make_queue(drain=False)
    drainer.record("GROUP", "FIRST").wait(10)
    until(lambda: drainer._outbox._asleep, "it sleeps")
    began = time.monotonic()
    recorder.record("GROUP", "SECOND").wait(20)
    assert time.monotonic() - began < 10
    assert users(per) == ["FIRST", "SECOND"]


def test_options_of_the_url_are_refused_with_a_remedy(make_queue, pooler):
    """A search path in the URL, which a pooler does not take, is an error that says what to do instead."""
    with pytest.raises(OutboxError, match=r"startup parameter.*ALTER ROLE"):
        make_queue(f"{pooler.url}?options=-csearch_path%3Dother")


def test_a_pooler_without_room_is_told(database, outbox, make_queue):
    """With too many clients at the pooler the error says so, and what was recorded before stays."""
    with Pooler(database, outbox.rpartition("%3D")[2], most=1) as pooler:
        queue = make_queue(pooler.url, drain=False)
        queue.record("GROUP", "USER")
        with pytest.raises(OutboxError, match=r"no more connections allowed.*max_connections"):
            make_queue(pooler.url, drain=False)
        assert queue.stats().pending == 1
