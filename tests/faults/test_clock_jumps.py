"""A real process whose wall clock jumps: a preloaded library shifts what the C library says the time is."""

import shutil
import sqlite3
import struct
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from perqueue.sandbox import RateLimited, Refuse, Status
from tests.faults._rounds import rounds
from tests.helpers import Child, environment, repeats, until

HOUR = 3600
MOST = 5
"""Seconds that a jump may delay anything."""
FEW_JUMPS = {
    "five minutes back": -300,
    "an hour back": -HOUR,
    "ten years ahead": 87_600 * HOUR,
}
MORE_JUMPS = {
    "a minute back": -60,
    "an hour ahead": HOUR,
    "ten years back": -87_600 * HOUR,
}
JUMPS = rounds(FEW_JUMPS, FEW_JUMPS | MORE_JUMPS)
each_jump = pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS)

PROGRAM = """
    queue = PerQueue(retry=RetryPolicy(base=0.2, cap=1.0))
    say("ready")
    while line := hear():
        command, _, user = line.partition(" ")
        if command == "record":
            queue.record("GROUP", user)
            say("recorded")
        elif command == "time":
            say(time.time())
        elif command == "state":
            say(queue.stats().state)
        elif command == "flush":
            began = time.monotonic()
            try:
                queue.flush(float(user))
            except FlushTimeout:
                pass
            say(time.monotonic() - began)
    queue.close()
"""


class WallClock:
    """The clock of all children that are started with its environment."""

    def __init__(self, shim, file):
        self._file = file
        self.environment = {"LD_PRELOAD": str(shim), "CLOCK_OFFSET": str(file)}
        self.jump(0)

    def jump(self, seconds):
        """Set the clock to the true time plus so many seconds."""
        self.offset = seconds
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.write(struct.pack("l", seconds))


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library, compiled."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    library = tmp_path_factory.mktemp("shim") / "clock_shim.so"
    source = Path(__file__).with_name("_clock_shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    return library


@pytest.fixture
def clock(shim, tmp_path):
    return WallClock(shim, tmp_path / "offset")


@pytest.fixture
def start(per, outbox, clock):
    """Start the program, on one outbox and with the clock that jumps."""
    children = []

    def program():
        child = Child(PROGRAM, env=environment(outbox, per) | clock.environment, measured=False)
        children.append(child)
        child.expect("ready")
        return child

    yield program
    for child in children:
        child.__exit__(None, None, None)


def tell(child, line, answer=""):
    child.tell(line)
    return child.expect(answer)


def arrives(per, count, allowed=0.0):
    """Wait for so many activities at Per; fail if a jump has delayed them for too long."""
    per.wait_for(count, timeout=allowed + MOST)


def waited(per):
    """Return the seconds between the first request and the next."""
    first, second, *_ = per.request_log
    return (second.at - first.at).total_seconds()


def select(outbox, query):
    with closing(sqlite3.connect(outbox)) as reader:
        return reader.execute(query).fetchall()


def test_clock_of_the_child_jumps(start, clock):
    """The wall clock of the program jumps as these tests mean it to."""
    child = start()
    for jump in (0, *FEW_JUMPS.values(), *MORE_JUMPS.values()):
        clock.jump(jump)
        before = time.time()
        assert before - 0.1 < float(tell(child, "time")) - jump < time.time() + 0.1


@each_jump
def test_delivery_goes_on(per, start, clock, outbox, jump):
    """Recording, delivery and flush() take no notice of a jump there and back, nor does what is stored."""
    child = start()
    tell(child, "record BEFORE", "recorded")
    arrives(per, 1)
    stored = select(outbox, "SELECT * FROM perqueue_activity")
    for count, offset in enumerate([jump, 0], start=2):
        clock.jump(offset)
        before = time.time()
        tell(child, f"record AFTER_{count}", "recorded")
        after = time.time()
        arrives(per, count)
        ((recorded_at,),) = select(outbox, f"SELECT recorded_at FROM perqueue_activity WHERE id = {count}")
        assert before - 0.1 < recorded_at / 1000 - offset < after + 0.1
        assert float(tell(child, "flush 10")) < MOST
    assert select(outbox, "SELECT * FROM perqueue_activity WHERE id = 1") == stored
    assert repeats(per) == 0


@each_jump
def test_outage_ends(per, start, clock, jump):
    """A jump in the middle of an outage delays nothing afterwards, and a flush() meanwhile ends in time."""
    child = start()
    per.set_fault(Status(503))
    tell(child, "record DURING", "recorded")
    per.wait_for_requests(3)
    clock.jump(jump)
    tell(child, "record AFTER", "recorded")
    assert 0.2 < float(tell(child, "flush 0.3")) < 0.3 + MOST
    per.clear_faults()
    arrives(per, 2)


@each_jump
def test_retry_after_is_as_long_as_per_asked(per, start, clock, jump):
    """`Retry-After` is obeyed for as long as Per had asked, and no longer."""
    asked = 1
    per.set_fault(RateLimited(asked), times=1)
    child = start()
    tell(child, "record USER", "recorded")
    per.wait_for_requests(1)
    clock.jump(jump)
    arrives(per, 1, allowed=asked)
    assert waited(per) > 0.9 * asked


@each_jump
def test_retry_after_as_a_date_is_by_pers_clock(per, start, clock, jump):
    """A date in `Retry-After` means what it means to the server, however wrong the clock is here."""
    asked = 2  # a date has whole seconds, so this one comes after one second at the earliest
    per.set_fault(RateLimited(asked, as_date=True), times=1)
    clock.jump(jump)
    child = start()
    tell(child, "record USER", "recorded")
    arrives(per, 1, allowed=asked)
    assert waited(per) > 0.45 * asked


@each_jump
def test_retry_after_ends_after_a_restart(per, start, clock, jump):
    """A wait that a restart finds in the outbox is never longer than Per had asked for."""
    asked = 2
    per.set_fault(RateLimited(asked), times=1)
    child = start()
    tell(child, "record USER", "recorded")
    until(lambda: tell(child, "state") == "backing_off", "the wait is stored")
    child.kill()
    clock.jump(jump)
    start()
    arrives(per, 1, allowed=asked)


@each_jump
def test_own_wait_of_one_activity_ends(per, start, clock, jump):
    """One that failed while others got through is tried again in its time, though that is stored."""
    child = start()
    per.set_fault(Status(500), when=lambda activity: activity.user_id == "POISON")
    for user in ("USER_1", "POISON", "USER_2"):
        tell(child, f"record {user}", "recorded")
    arrives(per, 2)
    until(lambda: per.requests >= 5, "it is retried on its own account")
    clock.jump(jump)
    time.sleep(0.1)  # longer than the drain's tick: it is noticed while nothing else happens
    per.clear_faults()
    arrives(per, 3, allowed=2)


@each_jump
def test_nothing_undelivered_is_pruned(per, start, clock, outbox, jump):
    """However old they look, activities that are pending or rejected are kept (invariant 3)."""
    per.set_fault(Refuse("no such company"), when=lambda activity: activity.user_id.startswith("REFUSED"))
    per.set_fault(Status(500), when=lambda activity: activity.user_id.startswith("BROKEN"))
    child = start()
    for n in range(10):
        for kind in ("GOOD", "REFUSED", "BROKEN"):
            tell(child, f"record {kind}_{n}", "recorded")
    count = "SELECT state, count(*) FROM perqueue_activity_log GROUP BY state ORDER BY state"
    whole = [("accepted", 10), ("pending", 10), ("rejected", 10)]
    until(lambda: select(outbox, count) == whole, "all have met their fate")
    clock.jump(jump)
    child.kill()
    child = start()
    tell(child, "record NEWEST", "recorded")  # the highest ID stays, whatever its age
    arrives(per, 11)
    # What looks old enough is pruned: this clock is the only one there is.
    left = [("accepted", 1 if jump > 40 * 24 * HOUR else 11)]
    until(lambda: select(outbox, count) == [*left, *whole[1:]], "only what was delivered long ago is gone")
    clock.jump(0)
    per.clear_faults()
    child.kill()
    start()
    arrives(per, 21)
