"""Two hosts and a database between them: one is cut off from it, or from Per, and the other does its work."""

import time
from types import SimpleNamespace

import pytest

from perqueue.sandbox import Hang, Latency
from tests import postgresql
from tests.helpers import repeats, until, users
from tests.postgres import namespaces
from tests.postgres.quick import LEASE
from tests.postgres.wire import Wire

pytestmark = pytest.mark.root

DRAIN = """
from perqueue._outbox.postgres.settling import SettledSession
settle, stale = SettledSession.settle, []
def counted(self, settlements, **more):
    done = settle(self, settlements, **more)
    stale.extend(self.lost)
    return done
SettledSession.settle = counted

queue = PerQueue(max_in_flight=4, exit_timeout=0, request_timeout=1, retry=RetryPolicy(base=0.1, cap=0.3))
say("ready")
while order := hear():
    if order == "stale":
        say(len(stale))
    else:
        queue.record("GROUP", order).wait(20)
        say("delivered")
queue.close()
"""


@pytest.fixture(scope="module")
def spaces():
    """Two hosts, and a database that both reach."""
    namespaces.need()
    postgresql.need()
    hosts, server = [], None
    try:
        hosts = [namespaces.Host(number) for number in (1, 2)]
        addresses = ",".join(["127.0.0.1", *(host.gateway for host in hosts)])
        server = postgresql.Server([f"listen_addresses={addresses}"], network="10.213.0.0/16")
        yield hosts, server
    finally:
        for host in hosts:
            host.remove()
        if server is not None:
            server.close()


def per_port(per):
    return int(per.url.rpartition(":")[2])


@pytest.fixture
def hosts(spaces, per, child):
    """Start a drainer on a host: `hosts.drain(0)`; cut `hosts.places[0]` off, or `hosts.wires[0]` to Per."""
    places, server = spaces
    server.sql("DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    wires = [Wire(per_port(per), place.listen(per_port(per))) for place in places]

    def drain(number):
        place = places[number]
        process = child(
            DRAIN,
            wrapper=place.inside,
            PERQUEUE_OUTBOX=server.url.replace("127.0.0.1", place.gateway),
        )
        process.expect("ready", 30)
        return process

    yield SimpleNamespace(places=places, wires=wires, drain=drain, sql=server.sql, url=server.url)
    for place, wire in zip(places, wires, strict=True):
        place.mend()
        wire.close()


def pending(hosts):
    return hosts.sql("SELECT count(*) FROM perqueue_pending")[0][0]


def accepted(hosts):
    """Return how many the outbox has counted, which is once each."""
    ((ended,),) = hosts.sql("SELECT accepted FROM perqueue_outbox")
    return ended + sum(count for (count,) in hosts.sql("SELECT accepted FROM perqueue_drainer"))


def test_a_host_that_is_cut_off_from_the_database_is_replaced(per, hosts, make_queue):
    """What a host had claimed that cannot reach the database any more is delivered by another one within
    two leases; and when it is back it settles nothing of it, and goes on.
    """
    recorder = make_queue(hosts.url, drain=False)
    for number in range(100):
        recorder.record("GROUP", f"USER_{number}")
    per.set_fault(Latency(0.02))
    cut_off = hosts.drain(0)
    per.wait_for(10)
    per.clear_faults()
    per.set_fault(Hang())
    other = hosts.drain(1)
    until(lambda: per.requests - per.accepted >= 4, "some are in flight")
    hosts.places[0].cut()
    began = time.monotonic()
    per.clear_faults()
    per.set_fault(Latency(0.05))
    per.release()
    until(lambda: pending(hosts) == 0, "all are delivered")
    print(f"rescued after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 2 * LEASE + 2  # a busy machine is late
    hosts.places[0].mend()
    until(lambda: int(ask(cut_off, "stale")) > 0, "what it could not write down is another's", 20)
    assert ask(cut_off, "BACK") == "delivered"
    assert accepted(hosts) == 101
    assert set(users(per)) == {f"USER_{number}" for number in range(100)} | {"BACK"}
    assert repeats(per) <= 4 + 16, "in flight, and answered but not written down"
    other.tell("")


def test_a_host_that_is_cut_off_from_per_holds_up_nobody(per, hosts, make_queue):
    """What a host had claimed that reaches the database, but not Per, is delivered by another one."""
    recorder = make_queue(hosts.url, drain=False)
    for number in range(100):
        recorder.record("GROUP", f"USER_{number}")
    per.set_fault(Latency(0.02))
    cut_off = hosts.drain(0)
    per.wait_for(10)
    hosts.wires[0].cut()
    other = hosts.drain(1)
    assert ask(other, "OTHER") == "delivered"
    until(lambda: pending(hosts) == 0, "all are delivered", 20)
    hosts.wires[0].mend()
    assert ask(cut_off, "BACK") == "delivered"
    assert accepted(hosts) == 102
    assert set(users(per)) == {f"USER_{number}" for number in range(100)} | {"OTHER", "BACK"}
    ((failed,),) = hosts.sql("SELECT count(*) FROM perqueue_attempt")
    assert repeats(per) <= failed  # the wire carries them, once it is mended


def ask(child, order):
    child.tell(order)
    return child.expect("", 30)
