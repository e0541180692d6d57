"""The power fails while a process records, delivers and checkpoints: what was acknowledged is on the disk."""

import random
import sqlite3
import time
from contextlib import closing

import pytest

from perqueue._outbox import SQLiteOutbox
from tests.faults._disks import CutOffDisk
from tests.faults._rounds import rounds
from tests.helpers import AckPipe, Child, environment, users

pytestmark = pytest.mark.root

PROMISED = 0.2
"""Seconds before a power cut from which on everything recorded with durability="process" is kept."""

RECORD_IN_FOUR_THREADS = """
    import logging
    from perqueue._outbox import disk, session

    logging.disable()  # the disk that fails is what this is about
    acks, durability, run, how = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
    disk.CHECKPOINT_COMMITS, disk.WAL_LIMIT = 60, 1 << 17
    if how == "synchronous=OFF":
        connect = disk.connect

        def careless(path, **given):
            connection = connect(path, **given)
            connection.execute("PRAGMA synchronous = OFF")
            return connection

        disk.connect = session.connect = careless
        disk.DiskKeeper.sync = lambda keeper: None

    def acknowledge(user):
        os.write(acks, f"{user} {time.monotonic()}\\n".encode())

    def work(queue, thread):
        for n in range(1_000_000):
            user = f"{run}-{thread}-{n}"
            if how == "acknowledge first":
                acknowledge(user)
                time.sleep(0.05)
            queue.record("GROUP", user)
            if how != "acknowledge first":
                acknowledge(user)
            time.sleep(0.004)

    def beat():
        while True:
            before = time.monotonic()
            time.sleep(0.005)
            slow(time.monotonic() - before)

    def slow(seconds):
        if seconds > 0.03:
            os.write(acks, f"slow {seconds}\\n".encode())

    def timed(method):
        def call(keeper):
            before = time.monotonic()
            try:
                method(keeper)
            finally:
                slow(time.monotonic() - before)

        return call

    disk.DiskKeeper.sync = timed(disk.DiskKeeper.sync)
    disk.DiskKeeper._checkpoint = timed(disk.DiskKeeper._checkpoint)
    threading.excepthook = lambda _: None
    queue = PerQueue(durability=durability, max_in_flight=8)
    for thread in range(4):
        threading.Thread(target=work, args=(queue, thread), daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    say("ready")
    time.sleep(60)
"""


@pytest.fixture
def disk(tmp_path):
    """A disk whose power can be cut."""
    with CutOffDisk(tmp_path) as disk:
        yield disk


def cut_while_recording(disk, path, per, durability, run, *, how=""):
    """Cut the power at a random moment, and return how many seconds before it each was acknowledged.

    And the times for which this machine stood still: its disk, or its processor.
    """
    arguments = (durability, run, how)
    with AckPipe() as pipe:
        with Child(
            RECORD_IN_FOUR_THREADS,
            pipe.writer,
            *arguments,
            env=environment(path, per),
            pass_fds=[pipe.writer],
            measured=False,
        ) as child:
            child.expect("ready")
            pipe.drain(random.uniform(0.1, 0.7))
            moment = time.monotonic()
            disk.cut()
            pipe.drain(0.05)  # a sync that was under way says how long it took
        said = [line.split() for line in pipe.acknowledged()]
    disk.restart()
    ages = {what: moment - float(number) for what, number in said if what != "slow"}
    # What returns while the cut is under way may come too late for a file system that is being shut down.
    acknowledged = {user: age for user, age in ages.items() if age > 0}
    return acknowledged, [float(number) for what, number in said if what == "slow"]


def stored(path, origin):
    """Return the users in the outbox, whose file must be sound."""
    with closing(SQLiteOutbox(path, origin)) as outbox:
        position = outbox.position()
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        states = dict(reader.execute("SELECT user_id, state FROM perqueue_activity_log"))
    assert list(states.values()).count("pending") == position.pending
    return set(states)


def test_power_cut_loses_nothing_that_was_acknowledged(disk, per, make_queue):
    """With durability="power", what record() returned for is there after a power cut, and is delivered."""
    everything = set()
    for run in range(rounds(4, 40)):
        path = disk.mount_point / f"outbox-{run // 10}.db"
        acknowledged, _ = cut_while_recording(disk, path, per, "power", run)
        everything = set(acknowledged) | (everything if run % 10 else set())
        assert everything - stored(path, per.url) == set()
    assert len(everything) > 50
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA user_version").fetchone() > (5,)  # so many checkpoints were among it
    queue = make_queue(path, activity_type_id="TYPE")
    queue.flush(60)
    queue.close()
    assert everything <= set(users(per))


def test_power_cut_costs_the_last_moments_only(disk, per):
    """With durability="process", whatever was recorded 200 ms before a power cut is there after it."""
    worst, longest, kept = [], [], set()
    for run in range(rounds(4, 40)):
        path = disk.mount_point / f"outbox-{run // 10}.db"
        acknowledged, stalls = cut_while_recording(disk, path, per, "process", run)
        found = stored(path, per.url)
        worst.append(max((age for user, age in acknowledged.items() if user not in found), default=0.0))
        # Two syncs lie between a commit and the disk: the one that it came too late for, and its own.
        assert worst[-1] < PROMISED + 2 * max(stalls, default=0.0)
        longest.append(max(stalls, default=0.0))
        kept = (kept if run % 10 else set()) | (set(acknowledged) & found)
        assert kept <= found  # what survived one cut survives the next
    print(
        f"the oldest activity lost had been recorded {max(worst) * 1000:.0f} ms before the cut,"
        f" in the median {sorted(worst)[len(worst) // 2] * 1000:.0f} ms, of {len(worst)} cuts;"
        f" this machine's disk or processor stood still for {max(longest) * 1000:.0f} ms"
    )


@pytest.mark.parametrize("how", ["acknowledge first", "synchronous=OFF"])
def test_checker_sees_what_a_power_cut_takes(disk, per, how):
    """A recorder that acknowledges before the commit or does not sync loses, and the same check finds it."""
    lost = set()
    for attempt in range(6):  # now and then a cut meets a moment in which all is committed
        path = disk.mount_point / f"outbox-{attempt}.db"
        SQLiteOutbox(path, per.url).close()
        acknowledged, _ = cut_while_recording(disk, path, per, "power", 0, how=how)
        lost = set(acknowledged) - stored(path, per.url)
        if lost:
            break
    assert lost
