"""Single stories in virtual time: what takes minutes or hours, and needs several processes."""

from contextlib import closing

import pytest

from perqueue import PerQueue, RetryPolicy
from tests.faults._virtual import REQUEST_TIMEOUT, RETRY_AFTER, TOKEN, FakePer, Line, World
from tests.helpers import until

MINUTE = 60


@pytest.fixture
def world():
    with closing(World(wall=1_800_000_000)) as each:
        yield each


@pytest.fixture
def fake_per(world):
    return FakePer(world.loop)


@pytest.fixture
def start(fake_per, outbox):
    """Start a process on the outbox: return its line to Per, and its queue."""
    queues = []

    def process(**options):
        line = Line(fake_per)
        queue = PerQueue(
            outbox,
            transport=line.transport,
            **{"activity_token": TOKEN, "activity_type_id": "TYPE"} | options,
        )
        queues.append(queue)
        return line, queue

    yield process
    for queue in queues:
        queue.close()


def record(fake_per, queue, user, kind="TYPE"):
    fake_per.recorded[user] = ("GROUP", kind)
    queue.record("GROUP", user, activity_type_id=kind)


@pytest.mark.parametrize("back", [2, 30, 5 * MINUTE, 14 * MINUTE, 16 * MINUTE, 600 * MINUTE])
def test_clock_set_back_prolongs_no_wait_of_a_single_activity(world, fake_per, start, back):
    """However far the clock is set back, one that failed by itself is tried again within seconds."""
    _, queue = start(retry=RetryPolicy(base=0.2, cap=1.0))
    record(fake_per, queue, "USER", "BROKEN")
    record(fake_per, queue, "OTHER")
    for _ in range(100):  # as few tries as possible, so that no wait is longer than two seconds
        world.wait(0.02)
        if queue.stats().delivered:
            break
    assert (queue.stats().pending, queue.stats().delivered) == (1, 1)
    world.wall -= back
    fake_per.heal()
    world.wait(5)
    assert queue.stats().pending == 0


def test_retry_after_outweighs_an_older_pause(world, fake_per, start, outbox):
    """One that paused for a bad token and takes over obeys what Per asked of its predecessor."""
    _, first = start()
    fake_per.script.extend(["bad_token"])
    record(fake_per, first, "USER")
    world.wait(0.1)
    assert first.stats().state == "paused"
    line, second = start()
    fake_per.script.extend(["throttle"])
    world.wait(0.5)
    assert second.stats().state == "backing_off"
    second._outbox.close()  # killed
    line.cut = True
    second.close()
    world.wait(2 * RETRY_AFTER)
    assert fake_per.wrong == []
    assert first.stats().delivered == 1


def test_bad_token_does_not_make_a_full_disk_forget(world, fake_per, start):
    """What Per has accepted is held until it can be stored, also when the token is refused meanwhile."""
    _, queue = start()
    for n in range(10):
        record(fake_per, queue, f"BEFORE_{n}")
    world.wait(1)
    fake_per.script.extend(["slow", "slow", "slow", "bad_token"])
    for n in range(4):
        record(fake_per, queue, f"USER_{n}")
    connection = queue._outbox._usable()
    connection.execute("PRAGMA query_only = 1")
    world.wait(3)
    sent = fake_per.requests
    world.wait(30)
    assert fake_per.requests == sent
    connection.execute("PRAGMA query_only = 0")
    world.wait(5)
    assert fake_per.wrong == []
    assert queue.stats().delivered == 14


def test_a_pause_that_cannot_be_stored_is_seen(world, fake_per, start, caplog):
    """Without a token nothing is sent, and stats() says so, also while the disk refuses to store why."""
    tokens = []

    def token():
        if not tokens:
            connection.execute("PRAGMA query_only = 1")
            raise LookupError
        return tokens[0]

    _, queue = start(activity_token=token)
    connection = queue._outbox._usable()
    record(fake_per, queue, "USER")
    # The token is asked on a thread, which lives in real time.
    until(lambda: world.wait(0.1) or "there is no activity token" in caplog.text, "the token is missed")
    for _ in range(40):
        world.wait(1)
        assert queue.stats().state == "paused"
        assert "write" in queue.stats().reason
    assert "outcomes" not in caplog.text
    tokens.append(TOKEN)
    connection.execute("PRAGMA query_only = 0")
    until(lambda: world.wait(1) or queue.stats().delivered, "it is delivered")


def test_a_disk_that_refuses_writes_is_told_once(world, fake_per, start, caplog):
    """Also while nothing is pending: stats() says so until it is over, the log when it begins and ends."""
    _, queue = start()
    record(fake_per, queue, "FIRST")
    world.wait(1)
    fake_per.mode = "late"
    record(fake_per, queue, "USER")
    world.wait(2 * REQUEST_TIMEOUT + 0.5)  # between two times of writing down how busy it is
    assert queue.stats().delivered == 2
    connection = queue._outbox._usable()
    connection.execute("PRAGMA query_only = 1")
    world.wait(2)
    for _ in range(100):
        assert queue.stats().state == "paused"
        world.wait(0.25)
    connection.execute("PRAGMA query_only = 0")
    world.wait(2)
    assert queue.stats().state == "idle"
    assert caplog.text.count("delivery waits until the outbox works") == 1
