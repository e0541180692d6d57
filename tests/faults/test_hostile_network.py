"""Servers and networks that do their worst: what is sent in time, what it costs, and that nothing is lost."""

import itertools
import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing, suppress

import httpx
import pytest

from perqueue import RetryPolicy
from tests.faults._hostile import HOSTILE, a_gzip_bomb, bomb
from tests.faults._raw_server import RawServer, healthy
from tests.faults._rounds import rounds
from tests.helpers import Child, least, until

SLACK = 1.0
"""Seconds by which a request may exceed its deadline."""
MOST_MEMORY = 20_000
"""kB that the process may grow by."""

MEASURED = """
def memory(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(what))

def timed(client):
    began = time.monotonic()
    try:
        return "accepted " + client.add_activity("G", "PROBE"), time.monotonic() - began
    except PerAPIError as error:
        return str(error), time.monotonic() - began
"""


@pytest.fixture(scope="module", autouse=True)
def _made_in_time():
    """No server is slow because it has to make what it sends."""
    bomb()


def test_no_answer_costs_more_than_its_deadline_or_much_memory():
    """Whatever a server sends, a request ends within a second of its deadline, and the process needs less
    than 20 MB more, at its peak.
    """
    script = (
        MEASURED
        + """
client = PerClient(request_timeout=0.5)
client.add_activity("G", "WARM_UP")
say(memory("VmRSS"))
while hear():
    words, seconds = timed(client)
    say(f"{seconds:.3f} {words}")
    say(memory("VmHWM"))
client.close()
"""
    )
    with RawServer() as server:
        options = {"PER_BASE_URL": server.url, "PER_ACTIVITY_TOKEN": "token-1", "ACTIVITY_TYPE_ID": "TYPE"}
        with Child(script, env=options, measured=False) as child:
            before = int(child.expect(""))

            def seconds():
                child.tell("go")
                took, words = child.expect("").split(" ", 1)
                assert "no transaction ID" in words, server.behave
                assert "more than 65536 bytes" in words or server.behave is not a_gzip_bomb
                assert int(child.expect("")) - before < MOST_MEMORY, server.behave
                return float(took)

            for behave in HOSTILE:
                server.behave = behave
                assert least(seconds, 0.5 + SLACK) < 0.5 + SLACK, behave
            child.tell("")
            child.succeed()


def failed_attempts(outbox):
    """Return how many requests brought no answer, by the outbox's account."""
    with closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as connection:
        return connection.execute("SELECT count(*) FROM perqueue_attempt").fetchone()[0]


def lost(queue, server, users):
    """Return what is delivered by the outbox's account, and was never accepted."""
    assert queue.stats().pending == 0
    return set(users) - set(server.accepted)


@pytest.mark.parametrize("behave", HOSTILE, ids=lambda behave: behave.__name__)
def test_nothing_is_lost_to_a_hostile_server(make_queue, outbox, behave):
    """Once the server is well again everything arrives; twice at most what failed, and is known to have."""
    attacks = itertools.count()
    attacked = []

    def at_first(wire, request):
        if next(attacks) < 3:
            attacked.append(request)
            return behave(wire, request)
        return wire.accept(request)

    users = [f"USER_{number}" for number in range(20)]
    with RawServer(at_first) as server:
        retry = RetryPolicy(base=0.02, cap=0.1)
        queue = make_queue(base_url=server.url, request_timeout=0.3, retry=retry, max_in_flight=4)
        for user in users:
            queue.record("GROUP_A", user)
        queue.flush(30)
        assert lost(queue, server, users) == set()
        assert len(attacked) == 3
        assert sum(server.accepted.values()) - len(users) <= failed_attempts(outbox)


def test_the_check_sees_a_loss(make_queue):
    """A control: a transport that says yes for a server that it never asked loses, and that is seen."""

    def lie(_request):
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "T"}})

    with RawServer(healthy) as server:
        queue = make_queue(base_url=server.url, transport=httpx.MockTransport(lie))
        queue.record("GROUP_A", "USER_1")
        queue.flush(10)
        assert lost(queue, server, ["USER_1"]) == {"USER_1"}


# -- a network of its own, in a namespace


PORT = 8423
SERVER = f"""
import json
from perqueue.sandbox import Sandbox
with Sandbox(port={PORT}) as per:
    say(per.activity_token)
    while hear():
        say(json.dumps([activity.user_id for activity in per.activities]))
"""
CLIENT = (
    MEASURED
    + """
queue = PerQueue(request_timeout=1, max_in_flight=8, retry=RetryPolicy(base=0.1, cap=0.4))
client = PerClient(request_timeout=1)
recorded = 0
while (order := hear()) != "end":
    if order == "memory":
        say(memory("VmRSS"))
    elif order == "time":
        words, seconds = timed(client)
        say(f"{seconds:.3f} {words}")
    elif order == "flush":
        try:
            say(queue.flush(40))
        except PerQueueError as error:
            say(error)
    elif order == "reason":
        say(queue.stats().reason)
    else:
        for _ in range(int(order)):
            queue.record("G", f"USER_{recorded}")
            recorded += 1
        say("recorded")
client.close()
queue.close()
"""
)


class Namespace:
    """A network namespace with a loopback of its own, and rules for its packets."""

    def __init__(self, name):
        self.name = name
        self.inside = ("ip", "netns", "exec", name)

    def filter(self, *rule):
        """Append a rule for what arrives on the namespace's loopback."""
        subprocess.run([*self.inside, "iptables", "-A", "INPUT", *rule], check=True, capture_output=True)

    def heal(self):
        """Remove all rules."""
        subprocess.run([*self.inside, "iptables", "-F", "INPUT"], check=True, capture_output=True)


@pytest.fixture
def namespace():
    """Make a network namespace, and remove it."""
    for tool, package in (("ip", "iproute2"), ("iptables", "iptables")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: {package})")
    name = f"perqueue-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"ip can make no network namespace here: {made.stderr.strip()}")
    try:
        space = Namespace(name)
        subprocess.run([*space.inside, "ip", "link", "set", "lo", "up"], check=True)
        listed = subprocess.run([*space.inside, "iptables", "-S"], capture_output=True, check=False)
        if listed.returncode:
            pytest.skip(f"iptables does not work here: {listed.stderr.decode().strip()}")
        yield space
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def cut_off(namespace, outbox):
    """A server and a client in the namespace, which has worked once: (namespace, server, client)."""
    with Child(SERVER, wrapper=namespace.inside, measured=False) as server:
        options = {
            "PER_BASE_URL": f"http://127.0.0.1:{PORT}",
            "PER_ACTIVITY_TOKEN": server.expect(""),
            "PER_ACTIVITY_TYPE_ID": "TYPE",
            "PERQUEUE_OUTBOX": str(outbox),
        }
        with Child(CLIENT, env=options, wrapper=namespace.inside, measured=False) as client:
            assert ask(client, 50) == "recorded"
            assert ask(client, "flush") == "None"
            assert "accepted" in ask(client, "time")
            yield namespace, server, client
            with suppress(subprocess.CalledProcessError):
                namespace.heal()
            client.tell("end")
            client.wait()


def ask(child, order, timeout=60.0):
    child.tell(order)
    return child.expect("", timeout)


def longest_attempt(outbox):
    """Return the seconds that the longest request took that brought no answer."""
    with closing(sqlite3.connect(f"file:{outbox}?mode=ro", uri=True)) as connection:
        (longest,) = connection.execute("SELECT max(duration_ms) FROM perqueue_attempt").fetchone()
    return (longest or 0) / 1000


def repeated(server, expected):
    """Return how often anything arrived beyond the first time; fail unless all of it did."""
    arrived = [user for user in json.loads(ask(server, "users")) if user != "PROBE"]
    assert set(arrived) == {f"USER_{number}" for number in range(expected)}
    return len(arrived) - expected


CUTS = {
    "requests are dropped": ("--dport", "DROP", "no answer within 1 s"),
    "answers are dropped": ("--sport", "DROP", "no answer within 1 s"),
    "requests are rejected by ICMP": ("--dport", "REJECT", "ConnectError"),
    "requests are rejected by a reset": ("--dport", "REJECT --reject-with tcp-reset", "ConnectError"),
}


@pytest.mark.root
@pytest.mark.parametrize("name", CUTS)
def test_a_firewall_in_between_loses_nothing(cut_off, outbox, name):
    """Whether packets vanish or are rejected, on their way there or back: every request ends within a
    second of its deadline, memory stays, the reason is shown, and afterwards everything arrives; twice at
    most what was in flight.
    """
    namespace, server, client = cut_off
    end, verdict, reason = CUTS[name]
    before = int(ask(client, "memory"))
    namespace.filter("-p", "tcp", end, str(PORT), "-j", *verdict.split())
    assert ask(client, 100) == "recorded"

    def seconds():
        took, words = ask(client, "time").split(" ", 1)
        assert "no transaction ID" in words
        return float(took)

    assert least(seconds, 1 + SLACK) < 1 + SLACK
    until(lambda: reason in ask(client, "reason"), f"{reason!r} is shown")
    assert int(ask(client, "memory")) - before < MOST_MEMORY
    namespace.heal()
    assert ask(client, "flush") == "None"
    assert repeated(server, 150) <= 8
    assert longest_attempt(outbox) < 1 + SLACK


@pytest.mark.root
def test_a_network_that_loses_every_fifth_packet_loses_nothing(cut_off, outbox):
    """With 20 % of all packets lost everything arrives all the same, in time."""
    namespace, server, client = cut_off
    before = int(ask(client, "memory"))
    namespace.filter("-p", "tcp", "-m", "statistic", "--mode", "random", "--probability", "0.2", "-j", "DROP")
    many = rounds(100, 2000)
    ask(client, many)
    while ask(client, "flush") != "None":
        pass
    assert int(ask(client, "memory")) - before < MOST_MEMORY
    namespace.heal()
    assert repeated(server, 50 + many) <= failed_attempts(outbox)
    assert longest_attempt(outbox) < 1 + SLACK
