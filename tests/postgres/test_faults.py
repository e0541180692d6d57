"""The database goes away, freezes or is cut off: nothing that was acknowledged is lost."""

import os
import signal
import time

import pytest

from perqueue import OutboxError, PerQueue
from perqueue.sandbox import Hang, Latency
from tests.helpers import free_port, repeats, until, users
from tests.postgres.conftest import recorded
from tests.postgres.wire import Wire

SECRET = "s3cret"

CARELESS = """
from perqueue._outbox.postgres import leases, settling
leases.LeasedSession.holds_lease = lambda self: True
settling._SETTLE = settling._SETTLE.replace("AND p.owner = %(owner)s", "")
"""
"""What makes a drainer one that never looks at its lease, and has no fence."""


FROZEN = """
queue = PerQueue(max_in_flight=4, exit_timeout=0)
hear()
queue.record(sys.argv[1], "THAWED").wait(20)
say("delivered")
"""


@pytest.fixture
def server(mortal):
    """A server that may be killed."""
    mortal.ensure_started()
    mortal.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    return mortal


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
def test_a_server_that_restarts_under_load_loses_nothing(per, make_queue, recorders, server, number):
    """What record() acknowledged is delivered, whether the server was stopped or killed meanwhile; what a
    careless program acknowledged is not, and that is seen.
    """
    drain = make_queue(server.url)
    drain._follower().start()
    recorders.start(server.url)
    per.wait_for(50)
    server.stop(number)
    recorders.noticed()
    server.start()
    per.wait_for(per.accepted + 50, timeout=30)
    careful, careless = recorders.end()
    drain.flush(60)
    assert careful - set(users(per)) == set()
    assert careless - set(users(per)) != set()
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
        until(lambda: recorded(queue), "it records again")
        queue.flush(20)
    finally:
        queue.close()


def test_a_cut_wire_holds_up_nobody(per, options, recorders, over_the_wire, wire):
    """A network that swallows everything fails record() in a second; what was acknowledged arrives, and
    what a careless program acknowledged does not, which is seen.
    """
    queue = PerQueue(over_the_wire, **options, exit_timeout=0)
    try:
        queue.record("GROUP", "BEFORE").wait(10)
        recorders.start(over_the_wire)
        wire.cut()
        assert "no answer within" in fails_soon(lambda: queue.record("GROUP", "CUT"))
        assert "no connection within" in fails_soon(lambda: queue.record("GROUP", "CUT"))
        recorders.noticed()
        wire.mend()
        until(lambda: recorded(queue), "it records again")
        careful, careless = recorders.end()
        queue.flush(30)
        assert {"BEFORE", "AFTER"} | careful <= set(users(per))
        assert careless - set(users(per)) != set()
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
        until(lambda: recorded(cut_off), "it records again", 20)
        cut_off.flush(20)
        assert other.stats().pending == 0
    finally:
        wire.mend()
        cut_off.close()


@pytest.mark.usefixtures("quick_leases")
def test_a_frozen_drainer_settles_nothing_late(per, make_queue, child, outbox, database):
    """A drainer frozen for longer than its lease finds, thawed, that others have delivered, and goes on;
    one without lease and fence sends what it had all over again, which is seen.
    """
    per.set_fault(Latency(0.02))
    schema = f"{outbox.rpartition('%3D')[2]}_careless"
    database.sql(f"CREATE SCHEMA {schema}")
    urls = {"CAREFUL": outbox, "CARELESS": f"{outbox}_careless"}
    frozen = []
    try:
        for group, url in urls.items():
            queue = make_queue(url, drain=False)
            for number in range(200):
                queue.record(group, f"USER_{number}")
            process = child(CARELESS * (group == "CARELESS") + FROZEN, group, PERQUEUE_OUTBOX=url)
            frozen.append(process)
            until(lambda group=group: len(arrived(per, group)) >= 20, "it delivers")
            os.kill(process.pid, signal.SIGSTOP)
        others = [make_queue(url) for url in urls.values()]
        for other in others:
            other.flush(30)
    finally:
        for process in frozen:
            os.kill(process.pid, signal.SIGCONT)
    assert [other.stats().delivered for other in others] == [200, 200]
    for process in frozen:
        process.tell("go on")
        process.expect("delivered", 30)
    repeated = [len(arrived(per, group)) - 201 for group in urls]
    assert [len(set(arrived(per, group))) for group in urls] == [201, 201]
    most = 4 + 4 * 5 + 4  # in flight, and answered in 0.1 s but not written down
    assert repeated[0] <= most < repeated[1]
    until(lambda: others[0].stats().delivered == 201, "both have counted")
    assert others[0].stats().rejected == 0


def arrived(per, group):
    """Return the users of a group that Per was told of, every repeat too."""
    return [activity.user_id for activity in per.activities if activity.billing_id == group]


def test_the_first_host_that_is_down_is_passed_over(make_queue, outbox, database, per):
    """With several hosts in the URL, the one that takes writes is found."""
    closed = free_port()
    url = outbox.replace(f"127.0.0.1:{database.port}/", f"127.0.0.1:{closed},127.0.0.1:{database.port}/")
    queue = make_queue(url)
    queue.record("GROUP", "USER").wait(10)
    assert per.accepted == 1
