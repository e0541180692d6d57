"""What a server limits: connections, the time of statements, transactions and idleness, and its disk."""

import subprocess
import threading
import time
from contextlib import closing, suppress

import pytest

from perqueue import FlushTimeout, OutboxError, PerQueue
from perqueue._outbox.postgres import outbox as outbox_of_postgres
from perqueue.sandbox import Hang, Latency
from tests.helpers import repeats, until, users
from tests.postgres.test_faults import fails_soon


def with_setting(outbox, setting):
    """Return the outbox's URL with a setting of the server."""
    return outbox.replace("csearch_path", f"c{setting.replace('=', '%3D')}%20-csearch_path")


def keeps_recording(queue, names, failures):
    """Record each name until that has worked; what fails and what works is counted."""
    for name in names:
        while True:
            try:
                queue.record("GROUP", name)
            except OutboxError as error:
                failures.append(str(error))
            else:
                break


def test_more_threads_than_connections_record_all(per, make_queue):
    """Forty threads share a few connections, and none of them fails."""
    queue = make_queue(drain=False)
    failures = []

    def work(name):
        try:
            for number in range(25):
                queue.record("GROUP", f"{name}_{number}")
        except OutboxError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert queue.stats().pending == 1000


def test_a_busy_pool_holds_up_no_drain(per, make_queue):
    """With all of a process's connections in use record() says so in a second; its drain has its own."""
    queue, other = make_queue(), make_queue(drain=False)
    queue.record("GROUP", "BEFORE").wait(10)
    shared = queue._outbox._shared
    held = [shared.take() for _ in range(5)]
    assert "opens no more than 5" in fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
    other.record("GROUP", "OTHER").wait(10)
    for connection in held:
        shared.give_back(connection)
    queue.record("GROUP", "AFTER").wait(10)
    assert users(per) == ["BEFORE", "OTHER", "AFTER"]


def test_a_server_without_room_for_connections_is_told(per, mortal, options):
    """With too many clients already, programs that start and those that were disconnected are told so, with
    the remedy; what they recorded before is delivered once there is room.
    """
    import psycopg

    mortal.ensure_started()
    mortal.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    with (
        closing(PerQueue(mortal.url, **options, drain=False)) as recorder,
        closing(psycopg.connect(mortal.url, autocommit=True)) as operator,
    ):
        recorder.record("GROUP", "BEFORE")
        taken = []
        try:
            with suppress(psycopg.OperationalError):
                while True:
                    taken.append(psycopg.connect(mortal.url))
            assert "max_connections" in fails_soon(lambda: PerQueue(mortal.url, **options))
            operator.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'perqueue'"
            )
            with suppress(psycopg.OperationalError):
                while True:
                    taken.append(psycopg.connect(mortal.url))
            assert "max_connections" in fails_soon(lambda: recorder.record("GROUP", "MEANWHILE"))
        finally:
            for connection in taken:
                connection.close()
        until(lambda: _can_open(mortal.url, options), "there is room")
        keeps_recording(recorder, ["AFTER"], [])
        with closing(PerQueue(mortal.url, **options)) as queue:
            queue.flush(20)
    assert set(users(per)) >= {"BEFORE", "AFTER"}


def _can_open(url, options):
    try:
        PerQueue(url, **options, drain=False).close()
    except OutboxError:
        return False
    return True


def test_a_statement_that_is_cancelled_is_told(per, make_queue, outbox):
    """A lock that outlasts the server's statement_timeout is an OutboxError with a remedy, not a hang; the
    drain says so, too, and goes on by itself.
    """
    import psycopg

    queue = make_queue(with_setting(outbox, "statement_timeout=200"))
    queue.record("GROUP", "BEFORE").wait(10)
    with psycopg.connect(outbox) as business:
        business.execute("LOCK TABLE perqueue_pending")
        assert "statement_timeout" in fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
        queue._worker._drain.more()
        until(lambda: "statement_timeout" in str(queue._worker._drain.trouble), "the drain says so")
    queue.record("GROUP", "AFTER").wait(10)
    assert users(per) == ["BEFORE", "AFTER"]


def test_a_lock_on_the_table_fails_record_in_a_second(make_queue):
    """Whoever locks the table holds up no program longer than that."""
    queue = make_queue(drain=False)
    with queue._outbox._transaction() as connection:
        connection.execute("LOCK TABLE perqueue_pending")
        assert "no answer within 1 s" in fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
    with pytest.raises(FlushTimeout):
        queue.record("GROUP", "AFTER") and queue.flush(0)


@pytest.mark.parametrize("setting", ["idle_in_transaction_session_timeout=2", "idle_session_timeout=30"])
def test_a_server_that_ends_idle_sessions_loses_nothing(per, make_queue, outbox, setting):
    """Connections that the server ends when they idle are opened again: nobody stays dark."""
    make_queue(drain=False).close()  # its tables are made in one transaction
    queue = make_queue(with_setting(outbox, setting), max_in_flight=4)
    names = [f"USER_{number}" for number in range(8)]
    for name in names:
        keeps_recording(queue, [name], [])
        time.sleep(0.04)  # longer than the server allows
    queue.flush(20)
    assert set(users(per)) == set(names)
    assert repeats(per) <= 4


def test_a_session_that_ends_in_the_moment_of_its_use_is_replaced(make_queue, outbox, sql, monkeypatch):
    """What the server ended as idle has not seen the statement, which another connection runs, once."""
    from perqueue._outbox.postgres.connection import Connection

    make_queue(drain=False).close()  # its tables are made in one transaction
    queue = make_queue(with_setting(outbox, "idle_session_timeout=50"), drain=False)
    queue.record("GROUP", "BEFORE")
    monkeypatch.setattr(Connection, "is_alive", lambda _: True)  # as it was a moment ago
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'perqueue'"
    until(lambda: sql(ours) == [(0,)], "the server has ended it")
    queue.record("GROUP", "AFTER")
    monkeypatch.undo()
    assert [each.user_id for each in queue.history()] == ["BEFORE", "AFTER"]


def test_connections_that_an_operator_ends_lose_nothing(per, make_queue, sql):
    """Whatever connections are terminated, again and again: what was acknowledged arrives; what was not
    recorded again after an error does not, which is seen.
    """
    per.set_fault(Latency(0.002))
    queue, recorder = make_queue(), make_queue(drain=False)
    failures, careless, names = [], [], []
    over = threading.Event()

    def record():
        while not over.is_set():
            names.append(f"USER_{len(names)}")
            keeps_recording(recorder, names[-1:], failures)
            try:
                recorder.record("CARELESS", names[-1])
            except OutboxError as error:
                careless.append(error)
            time.sleep(0.002)

    def goes_wrong():
        terminate(sql)
        return min(len(failures), len(careless)) > 5 and len(names) > 100

    thread = threading.Thread(target=record)
    thread.start()
    try:
        until(goes_wrong, "it goes wrong", 30)
    finally:
        over.set()
        thread.join()
    queue.flush(30)
    assert arrived(per, "GROUP") >= set(names)
    assert set(names) - arrived(per, "CARELESS") != set()
    assert repeats(per) - len(arrived(per, "CARELESS")) <= len(failures) + 32


def terminate(sql):
    """End every connection of perqueue's."""
    time.sleep(0.01)
    return sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'perqueue'")


def arrived(per, group):
    """Return the users of a group that Per was told of."""
    return {activity.user_id for activity in per.activities if activity.billing_id == group}


@pytest.fixture
def small_disk(outbox, database):
    """A disk of 4 MB for the test's tables alone."""
    place = database.folder / "disk"
    place.mkdir(exist_ok=True)
    owner = f"size=4m,uid={database.folder.stat().st_uid}"
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", owner, "none", place], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mount does not work here: {made.stderr.decode().strip()}")
    try:
        database.sql(f"CREATE TABLESPACE small LOCATION '{place}'")
        yield place
        database.sql(f"DROP SCHEMA {outbox.rpartition('%3D')[2]} CASCADE", "DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def until_refused(queue, names, first):
    """Record until the disk is full; return the place of the name that was refused."""
    for place, name in enumerate(names[first:], first):
        try:
            queue.record("GROUP", name)
        except OutboxError as error:
            assert "disk is full" in str(error)  # noqa: PT017 - it is one of many
            return place
    pytest.fail("the disk never was full")


@pytest.mark.root
def test_a_full_disk_of_the_server_is_told_and_passes(per, small_disk, make_queue, outbox):
    """When the server's disk is full record() says so, and the drain keeps what it cannot write down; once
    there is space all goes on by itself.
    """
    queue = make_queue(with_setting(outbox, "default_tablespace=small"), exit_timeout=0)
    names = [f"{number}_{'X' * 300}" for number in range(200)]
    per.set_fault(Hang())
    keeps_recording(queue, names[:60], [])
    until(lambda: per.requests, "one is sent")
    ballast = small_disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"0" * 4096):
            pass
    per.clear_faults()
    per.release()
    until(lambda: "disk is full" in str(queue._worker._drain.trouble), "outcomes cannot be written")
    recorded = until_refused(queue, names, 60)
    assert per.accepted < 60
    ballast.unlink()
    queue.flush(20)
    assert set(users(per)) - {names[recorded]} == set(names[:recorded])
    assert repeats(per) == 0


def test_a_long_transaction_of_somebody_elses_slows_no_record(make_queue, sql):
    """What is pending is counted for record() only where it matters: what vacuum may not remove adds up."""
    queue = make_queue(drain=False)
    queue._outbox.position = None
    queue.record("GROUP", "USER")

    def plan(most):
        query = outbox_of_postgres._ROOM % ("'perqueue_pending'", most)
        return "\n".join(row[0] for row in sql(f"EXPLAIN (ANALYZE, COSTS off) {query}"))

    assert "Aggregate (never executed)" in plan(10_000_000)
    assert "Aggregate (actual" in plan(1_000)
