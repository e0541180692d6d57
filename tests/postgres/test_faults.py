"""The database goes away, freezes or is cut off: nothing that was acknowledged is lost."""

import os
import signal
import threading
import time
from contextlib import suppress

import pytest

from perqueue import FlushTimeout, OutboxError, PerQueue
from perqueue.sandbox import Hang, Latency
from tests import postgresql
from tests.helpers import repeats, until, users
from tests.postgres.wire import Wire

SECRET = "s3cret"

RECORD = """
queue = PerQueue(drain=False)
say("ready")
number = 0
while not os.path.exists(sys.argv[1]):
    try:
        queue.record("GROUP", f"{os.getpid()}-{number}")
    except OutboxError:
        time.sleep(0.05)
        continue
    say(f"{os.getpid()}-{number}")
    number += 1
say("over")
"""


@pytest.fixture
def server():
    """A server of the test's own, that may be killed."""
    postgresql.need()
    server = postgresql.Server()
    yield server
    server.close()


@pytest.fixture
def wire(database):
    """A wire to the server that can be cut."""
    wire = Wire(database.port)
    yield wire
    wire.close()


@pytest.fixture
def over_the_wire(outbox, database, wire):
    """The test's outbox, by way of that wire."""
    return outbox.replace(f":{database.port}/", f":{wire.port}/")


def fails_soon(call, most=2.5):
    """Return the error of a call, which must come soon."""
    began = time.monotonic()
    with pytest.raises(OutboxError) as caught:
        call()
    assert time.monotonic() - began < most
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT], ids=["restart", "kill"])
def test_a_server_that_restarts_under_load_loses_nothing(per, make_queue, child, server, number):
    """What record() acknowledged is delivered, whether the server was stopped or killed meanwhile."""
    over = server.folder / "over"
    script = RECORD.replace("sys.argv[1]", repr(str(over)))
    recorders = [child(script, PERQUEUE_OUTBOX=server.url) for _ in range(2)]
    drain = make_queue(server.url)
    drain._follower().start()
    for recorder in recorders:
        recorder.expect("ready")
    per.wait_for(50)
    server.stop(number)
    time.sleep(0.2)
    server.start()
    before = per.accepted
    per.wait_for(before + 50, timeout=30)
    over.touch()
    acknowledged = set()
    for recorder in recorders:
        recorder.wait()
        acknowledged |= {line for line in recorder._output.rest() if line != "over"}
    drain.flush(60)
    assert acknowledged
    assert acknowledged <= set(users(per))
    assert repeats(per) <= 2 * 32 + 200  # what was in flight, or answered and not written down yet


def test_record_says_soon_that_the_server_is_gone(server, options):
    """Without a server record() raises within a second or so, with the remedy, and works when it is back."""
    queue = PerQueue(server.url, **options, exit_timeout=0)
    try:
        queue.record("GROUP", "BEFORE")
        server.stop()
        said = fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
        assert "everything is kept" in said
        fails_soon(queue.stats)
        server.start()
        until(lambda: _recorded(queue), "it records again")
        queue.flush(20)
    finally:
        queue.close()


def _recorded(queue):
    try:
        queue.record("GROUP", "AFTER")
    except OutboxError:
        return False
    return True


def test_a_cut_wire_holds_up_nobody(per, options, over_the_wire, wire):
    """A network that swallows everything fails record() in a second; what was recorded arrives afterwards."""
    queue = PerQueue(over_the_wire, **options, exit_timeout=0)
    try:
        queue.record("GROUP", "BEFORE").wait(10)
        wire.cut()
        assert "no answer within" in fails_soon(lambda: queue.record("GROUP", "CUT"))
        assert "no connection within" in fails_soon(lambda: queue.record("GROUP", "CUT"))
        wire.mend()
        until(lambda: _recorded(queue), "it records again")
        queue.flush(30)
        assert {"BEFORE", "AFTER"} <= set(users(per))
    finally:
        wire.mend()
        queue.close()


@pytest.mark.usefixtures("quick_leases")
def test_a_drainer_that_is_cut_off_is_replaced(per, make_queue, options, over_the_wire, wire):
    """While one drainer cannot reach the database another delivers; what the first one had is rescued."""
    cut_off = PerQueue(over_the_wire, **options, exit_timeout=0)
    try:
        cut_off.record("GROUP", "FIRST").wait(10)
        per.set_fault(Hang(), times=1)
        cut_off.record("GROUP", "HELD")
        until(lambda: per.requests == 2, "one is held")
        wire.cut()
        per.release()
        other = make_queue()
        other.record("GROUP", "OTHER")
        other.flush(20)
        assert {"FIRST", "HELD", "OTHER"} <= set(users(per))
        wire.mend()
        until(lambda: _recorded(cut_off), "it records again", 20)
        cut_off.flush(20)
        assert other.stats().pending == 0
    finally:
        wire.mend()
        cut_off.close()


def test_a_frozen_drainer_settles_nothing_late(per, make_queue, child, quick_leases):
    """A drainer frozen for longer than its lease finds, thawed, that others have delivered, and goes on."""
    per.set_fault(Latency(0.02))
    queue = make_queue(drain=False)
    for number in range(300):
        queue.record("GROUP", f"USER_{number}")
    process = child("""
        queue = PerQueue(max_in_flight=4, exit_timeout=0)
        say("ready")
        hear()
        queue.record("GROUP", "THAWED").wait(20)
        say("delivered")
    """)
    process.expect("ready")
    per.wait_for(20)
    os.kill(process.pid, signal.SIGSTOP)
    before = per.accepted
    try:
        other = make_queue()
        other.flush(30)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert other.stats().delivered == 300
    process.tell("go on")
    process.expect("delivered", 30)
    assert per.unique("GROUP") == 301
    assert repeats(per) <= 4 + 8, f"{before} before"  # in flight, and answered but not written down
    until(lambda: other.stats().delivered == 301, "both have counted")
    assert other.stats().rejected == 0


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


def test_a_server_without_room_for_connections_is_told(database, outbox, options):
    """With too many clients already, the error says so, and names the remedy."""
    import psycopg

    taken = []
    try:
        with suppress(psycopg.OperationalError):
            while True:
                taken.append(psycopg.connect(database.url))
        said = fails_soon(lambda: PerQueue(outbox, **options))
        assert "max_connections" in said
    finally:
        for connection in taken:
            connection.close()


def test_a_statement_that_is_cancelled_is_told(sql, make_queue, outbox):
    """A lock that outlasts the server's statement_timeout is an OutboxError with a remedy, not a hang."""
    url = outbox.replace("csearch_path", "cstatement_timeout%3D200%20-csearch_path")
    queue = make_queue(url, drain=False)
    queue.record("GROUP", "BEFORE")
    with queue._outbox._transaction() as connection:
        connection.execute("LOCK TABLE perqueue_pending")
        assert "statement_timeout" in fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
    queue.record("GROUP", "AFTER")
    assert queue.stats().pending == 2


def test_a_lock_on_the_table_fails_record_in_a_second(make_queue):
    """Whoever locks the table holds up no program longer than that."""
    queue = make_queue(drain=False)
    with queue._outbox._transaction() as connection:
        connection.execute("LOCK TABLE perqueue_pending")
        assert "no answer within 1 s" in fails_soon(lambda: queue.record("GROUP", "MEANWHILE"))
    with pytest.raises(FlushTimeout):
        queue.record("GROUP", "AFTER") and queue.flush(0)


def test_the_first_host_that_is_down_is_passed_over(make_queue, outbox, database, per):
    """With several hosts in the URL, the one that takes writes is found."""
    closed = postgresql.free_port()
    url = outbox.replace(f"127.0.0.1:{database.port}/", f"127.0.0.1:{closed},127.0.0.1:{database.port}/")
    queue = make_queue(url)
    queue.record("GROUP", "USER").wait(10)
    assert per.accepted == 1
