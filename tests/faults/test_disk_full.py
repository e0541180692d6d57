"""The disk fills up while a process records and delivers, and has room again later."""

import sqlite3
import threading
import time
from contextlib import closing

import pytest

from perqueue import DrainState, OutboxError
from perqueue.sandbox import Latency
from tests.faults._disks import mounted
from tests.faults._rounds import rounds
from tests.helpers import repeats, until, users

pytestmark = pytest.mark.root

IN_FLIGHT = 8
FULL_FOR = rounds(3, 30)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1536k", "none") as folder:
        yield folder


def fill(ballast):
    """Fill the disk to the last byte; what others free meanwhile is taken, too."""
    with ballast.open("ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue


class Recorder(threading.Thread):
    """Records every few milliseconds, and notes what came of it and how long it took."""

    def __init__(self, queue, *, acknowledge_first=False):
        super().__init__()
        self._queue = queue
        self._acknowledge_first = acknowledge_first
        self._stop_now = threading.Event()
        self.recorded, self.errors, self.took = [], [], []

    def run(self):
        n = 0
        while not self._stop_now.wait(0.005):
            n += 1
            began = time.monotonic()
            if self._acknowledge_first:
                self.recorded.append(f"USER_{n}")
            try:
                self._queue.record("GROUP", f"USER_{n}")
            except OutboxError as error:
                self.errors.append(str(error))
            else:
                self.recorded.append(f"USER_{n}")
            self.took.append(time.monotonic() - began)

    def stop(self):
        self._stop_now.set()
        self.join()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()


def stored(path):
    """Return the users in the outbox, whose file must be sound."""
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {user for (user,) in reader.execute("SELECT user_id FROM perqueue_activity")}


def test_full_disk_while_recording_and_delivering(per, make_queue, small_disk):
    """On a full disk record() raises at once, nothing is sent on and on, and freed space mends everything.

    What record() returned for is delivered, without a storm of repeats: answers that cannot be stored are
    held, and nothing more is sent until they are.
    """
    per.set_fault(Latency(0.02))
    path = small_disk / "outbox.db"
    queue = make_queue(path, max_in_flight=IN_FLIGHT)
    with Recorder(queue) as recorder:
        per.wait_for(50)
        ballast = small_disk / "ballast"
        fill(ballast)
        until(lambda: recorder.errors, "record() raises")
        stats = until(lambda: (s := queue.stats()).state is DrainState.PAUSED and s, "the drain notices")
        assert "disk is full" in stats.reason
        sent = per.requests
        deadline = time.monotonic() + FULL_FOR
        while time.monotonic() < deadline:
            fill(ballast)  # again and again: closing and reopening the file may free some
            time.sleep(0.1)
        assert per.requests <= sent + IN_FLIGHT
        assert [error for error in recorder.errors if "disk is full" not in error] == []
        refused, received = len(recorder.errors), len(recorder.recorded)
        ballast.unlink()
        until(lambda: len(recorder.recorded) > received + 20, "record() works again", timeout=5)
    queue.flush(30)
    *_, second, longest = sorted(recorder.took)
    print(
        f"{refused} times refused, the longest record() took {longest * 1000:.0f} ms,"
        f" {per.requests - sent} requests afterwards, {repeats(per)} repeats"
    )
    assert second < 1  # the machine itself may stand still for once
    assert set(recorder.recorded) <= set(users(per))
    assert repeats(per) <= IN_FLIGHT
    assert set(recorder.recorded) <= stored(path)
    queue.close()


def test_full_disk_while_only_recording(make_queue, small_disk):
    """What record() returned for is intact on a disk that filled up meanwhile, and so is the file."""
    path = small_disk / "outbox.db"
    queue = make_queue(path, drain=False)
    with Recorder(queue) as recorder:
        until(lambda: len(recorder.recorded) > 50, "some are recorded")
        fill(small_disk / "ballast")
        until(lambda: len(recorder.errors) > 20, "record() raises")
    (small_disk / "ballast").unlink()
    queue.close()
    assert set(recorder.recorded) <= stored(path)


def test_checker_sees_a_recorder_that_hides_the_full_disk(make_queue, small_disk):
    """A recorder that acknowledges whatever the disk says is found out by the same check."""
    path = small_disk / "outbox.db"
    queue = make_queue(path, drain=False)
    with Recorder(queue, acknowledge_first=True) as recorder:
        fill(small_disk / "ballast")
        until(lambda: len(recorder.errors) > 20, "record() raises")
    (small_disk / "ballast").unlink()
    queue.close()
    assert set(recorder.recorded) - stored(path)
