"""The disk refuses to write or to sync, once or for a while: record() says so, and it passes."""

import errno
import os
import shutil
import sqlite3
import time
from contextlib import closing

import pytest

from perqueue import OutboxError, PerQueue
from perqueue._outbox import disk
from perqueue.sandbox import Latency
from tests.faults._disks import Tampering
from tests.helpers import Child, environment, repeats, until

RECORD_WHEN_TOLD = """
    import logging

    logging.disable()
    queue = PerQueue(drain=False, durability=sys.argv[1])
    say("ready")
    while user := hear():
        if len(sys.argv) > 2:
            say("recorded")
        began = time.monotonic()
        try:
            queue.record("GROUP", user)
        except OutboxError as error:
            say(f"refused {time.monotonic() - began} {error}")
        else:
            if len(sys.argv) == 2:
                say("recorded")
"""
FAULTS = [
    ("power", "fdatasync:error=EIO"),
    ("power", "pwrite64:error=EIO"),
    ("power", "pwrite64:error=ENOSPC"),
    ("process", "pwrite64:error=EIO"),
    ("process", "pwrite64:error=ENOSPC"),
]


def users(path):
    """Return the users in the outbox, whose file must be sound."""
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {user for (user,) in reader.execute("SELECT user_id FROM perqueue_activity")}


def ask(child, user):
    """Have it recorded; return what came of it, and in how many seconds if it was refused."""
    child.tell(user)
    words = child.expect("").split(maxsplit=2)
    return words[0], float(words[1]) if len(words) > 1 else 0.0


@pytest.mark.parametrize(("durability", "fault"), FAULTS)
def test_disk_that_fails_for_a_while(outbox, durability, fault):
    """While the disk fails record() raises; what it returned for is there, and 5 s after it works again."""
    recorded = []
    with Child(RECORD_WHEN_TOLD, durability, env=environment(outbox, None), measured=False) as child:
        child.expect("ready")
        for n in range(20):
            assert ask(child, f"BEFORE_{n}") == ("recorded", 0)
            recorded.append(f"BEFORE_{n}")
        with Tampering(child.pid, fault):
            outcomes = [ask(child, f"DURING_{n}") for n in range(20)]
        assert {outcome for outcome, _ in outcomes} == {"refused"}
        assert sorted(took for _, took in outcomes)[-2] < 1  # the machine itself may stand still for once
        began = time.monotonic()
        until(lambda: ask(child, "PROBE")[0] == "recorded", "record() works again", timeout=5)
        print(f"works again {time.monotonic() - began:.2f} s after the fault's end")
        for n in range(20):
            assert ask(child, f"AFTER_{n}") == ("recorded", 0)
            recorded.append(f"AFTER_{n}")
        child.kill()
    assert {*recorded, "PROBE"} <= users(outbox)


@pytest.mark.parametrize(("durability", "fault"), FAULTS)
def test_disk_that_fails_once(outbox, durability, fault):
    """One failing call of each thread is an error of one record() or of the sync behind it, and no loss."""
    recorded, refused = [], 0
    with Child(RECORD_WHEN_TOLD, durability, env=environment(outbox, None), measured=False) as child:
        child.expect("ready")
        ask(child, "BEFORE")
        with Tampering(child.pid, f"{fault}:when=1"):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and len(recorded) < 50:
                user = f"USER_{len(recorded)}_{refused}"
                if ask(child, user)[0] == "recorded":
                    recorded.append(user)
                else:
                    refused += 1
                    time.sleep(0.01)
        child.kill()
    assert refused >= 1
    assert len(recorded) == 50
    assert set(recorded) <= users(outbox)


def test_checker_sees_a_recorder_that_hides_the_error(outbox):
    """A recorder that says "recorded" whatever the disk says is found out."""
    arguments = ("process", "acknowledge first")
    with Child(RECORD_WHEN_TOLD, *arguments, env=environment(outbox, None), measured=False) as child:
        child.expect("ready")
        with Tampering(child.pid, "pwrite64:error=ENOSPC"):
            assert ask(child, "USER") == ("recorded", 0)
            child.expect("refused")
        child.kill()
    assert users(outbox) == set()


class FailingOnce:
    """A sync that fails once, as the kernel has it: it drops what it could not write, and then succeeds."""

    def __init__(self, real):
        self.failures = 1
        self._real = real

    def __call__(self, descriptor):
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real(descriptor)


def test_nothing_is_acknowledged_behind_a_gap(tmp_path, outbox, monkeypatch):
    """After a failed sync the next record() returns only once all before it is in the main file, synced.

    What the kernel failed to write it will not write again, so a later sync of the log proves nothing.
    """
    with PerQueue(outbox, drain=False, activity_type_id="TYPE", durability="power") as queue:
        queue.record("GROUP", "BEFORE")
        monkeypatch.setattr(os, "fdatasync", FailingOnce(os.fdatasync))
        with pytest.raises(OutboxError, match="Input/output error"):
            queue.record("GROUP", "FAILED")

        def recorded():
            try:
                queue.record("GROUP", "LATER")
            except OutboxError as error:
                return "failed to sync" not in str(error)
            return True

        until(recorded, "record() works again", timeout=5)
        shutil.copy(outbox, tmp_path / "without its log.db")
        assert users(tmp_path / "without its log.db") >= {"BEFORE", "FAILED"}


def test_sync_that_fails_in_a_checkpoint_is_one_that_failed(tmp_path, outbox, monkeypatch):
    """A sync that fails while SQLite checkpoints counts like any other: all before it is written anew."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    with PerQueue(outbox, drain=False, activity_type_id="TYPE", durability="power") as queue:
        keeper, renewed = queue._outbox._disk, []
        real = keeper._truncate
        keeper._truncate = lambda: renewed.append(real()) or renewed[-1]

        def failing():
            monkeypatch.setattr(disk, "CHECKPOINT_COMMITS", 10**9)
            raise error

        keeper._checkpoint_alone = failing
        monkeypatch.setattr(disk, "CHECKPOINT_COMMITS", 1)
        queue.record("GROUP", "USER")
        until(lambda: renewed == [True], "everything is written anew")
        until(lambda: not keeper._in_doubt, "that is over")
        shutil.copy(outbox, tmp_path / "without its log.db")
        assert users(tmp_path / "without its log.db") == {"USER"}


def test_sync_that_fails_behind_record_is_logged_and_made_up_for(outbox, monkeypatch, caplog):
    """With durability="process", a failed sync is logged once, and all is on the disk once it works again."""
    with PerQueue(outbox, drain=False, activity_type_id="TYPE") as queue:
        failing = FailingOnce(os.fdatasync)
        failing.failures = 2
        monkeypatch.setattr(os, "fdatasync", failing)
        keeper = queue._outbox._disk
        queue.record("GROUP", "USER_1")
        until(lambda: failing.failures < 2, "the sync fails")
        queue.record("GROUP", "USER_2")
        until(lambda: keeper._synced == keeper._committed == 2, "all is synced")
    assert caplog.text.count("Input/output error") == 1


DELIVER = """
    import logging

    logging.disable()
    queue = PerQueue(max_in_flight=8)
    for n in range(1000):
        queue.record("GROUP", f"USER_{n}")
    say("recorded")
    hear()
    queue.flush(35)
    say(queue.stats().delivered)
    queue.close()
"""


@pytest.mark.parametrize("fault", ["pwrite64:error=EIO", "pwrite64:error=ENOSPC"])
def test_outcomes_that_cannot_be_written_are_held(per, outbox, fault):
    """While outcomes cannot be written nothing more is sent; afterwards each activity arrives, none twice."""
    per.set_fault(Latency(0.05))
    with Child(DELIVER, env=environment(outbox, per), measured=False) as child:
        child.expect("recorded")
        per.wait_for(20)
        with Tampering(child.pid, fault):

            def nothing_is_sent(seconds):
                sent = per.requests
                time.sleep(seconds)
                return per.requests <= sent + 1

            until(lambda: nothing_is_sent(0.2), "what was on its way has arrived")
            assert nothing_is_sent(1.2)
            assert per.requests < 1000
        per.clear_faults()
        child.tell("flush")
        assert int(child.expect("", timeout=40)) == 1000
        child.succeed()
    assert per.accepted == 1000
    assert repeats(per) == 0
