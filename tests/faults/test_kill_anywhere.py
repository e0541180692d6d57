"""`kill -9` at every system call of a record, a settlement and a checkpoint, one after the other."""

import sqlite3
from contextlib import closing

import pytest

from perqueue._outbox import SQLiteOutbox
from tests.faults._disks import Tampering, strace
from tests.faults._rounds import rounds
from tests.helpers import Child, environment, users

ORIGIN = "https://api.useper.com"
WRITING = ("pwrite64", "fdatasync", "fsync", "ftruncate", "unlink")
ALL = (*WRITING, "write", "fcntl", "openat", "close")

# Each stage: what is done, and then said. Its threads make the same system calls in the same order each time.
# Each run is a fork of one process: strace would slow down every interpreter's start.
STORIES = """
    import logging
    from pathlib import Path
    from perqueue._activity import Event, Settlement
    from perqueue._outbox import SQLiteOutbox, disk

    logging.disable()
    acknowledge_first = len(sys.argv) > 1
    disk.CHECKPOINT_COMMITS, disk.WAL_LIMIT = 1, 0

    def record(outbox, n):
        if acknowledge_first:
            say(f"recorded USER_{n}")
        outbox.append("GROUP", f"USER_{n}", "TYPE", 1_700_000_000_000)
        if not acknowledge_first:
            say(f"recorded USER_{n}")

    def settle(outbox):
        activity = outbox.claim(0, 1)[0]
        settlement = Settlement(activity=activity, event=Event.ACCEPT, answered_at=1_700_000_000_001,
                                duration_ms=1, transaction_id="TRANSACTION")
        outbox.settle([settlement], drained_through=activity.id, refusals=(0, None))
        say(f"settled {activity.user_id}")

    def story(path):
        outbox = SQLiteOutbox(Path(path), None)
        record(outbox, 1)
        settle(outbox)
        record(outbox, 2)
        keeper = outbox._disk
        while keeper._checkpointed < keeper._committed:  # synced, checkpointed and emptied meanwhile
            time.sleep(0.001)
        record(outbox, 3)
        settle(outbox)
        outbox.close()
        say("done")

    while path := hear():
        if pid := os.fork():
            say(f"begun {pid}")
            os.waitpid(pid, 0)
            say("ended")
        else:
            hear()
            story(path)
            os._exit(0)
"""


def killed(stories, path, call, number):
    """Kill a story at its n-th such system call, and return what it had said."""
    stories.tell(path)
    said = []
    with Tampering(int(stories.expect("begun")), f"{call}:signal=SIGKILL:when={number}"):
        stories.tell("go")
        while (line := stories.expect("", 30)) != "ended":
            said.append(line)
    return said


def told(path):
    """Return what the file says, which must be sound: states by user, and the number pending."""
    with closing(SQLiteOutbox(path, ORIGIN)) as outbox:
        pending = outbox.position().pending
        later = outbox.append("GROUP", "LATER", "TYPE", 1_700_000_000_002)
        assert outbox.settled([later]) == {}
    with closing(sqlite3.connect(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = dict(reader.execute("SELECT user_id, state FROM perqueue_activity_log"))
    assert rows.pop("LATER") == "pending"
    return rows, pending


def lost(said, rows):
    """Return what was said and is not so."""
    recorded = [line.split()[1] for line in said if line.startswith("recorded")]
    settled = [line.split()[1] for line in said if line.startswith("settled")]
    return [user for user in recorded if user not in rows] + [u for u in settled if rows[u] != "accepted"]


def kill_everywhere(folder, call, *more, step=1):
    """Kill at every such call of the story, and return how many there were and what was lost at which."""
    number, losses = 1, []
    with Child(STORIES, *more, measured=False) as stories:
        while True:
            path = folder / f"outbox-{call}-{number}.db"
            SQLiteOutbox(path, ORIGIN).close()
            said = killed(stories, path, call, number)
            rows, pending = told(path)
            assert pending == list(rows.values()).count("pending")
            losses += [(call, number, user) for user in lost(said, rows)]
            if "done" in said or (more and losses):
                return number, losses
            number += step


@pytest.mark.parametrize("call", rounds(WRITING, ALL))
def test_kill_at_every_system_call(tmp_path, call):
    """Whichever system call a process dies at, what it has recorded and settled stands, in a sound file."""
    calls, losses = kill_everywhere(tmp_path, call)
    print(f"killed at each of {calls - 1} {call}")
    assert losses == []
    assert calls > 1


def test_checker_sees_a_record_that_is_acknowledged_too_early(tmp_path):
    """A program that acknowledges before it records does lose, and the same check finds it."""
    _, losses = kill_everywhere(tmp_path, "pwrite64", "acknowledge first", step=2)
    assert losses


def test_kill_anywhere_in_a_delivery(per, make_queue, outbox):
    """Whichever write a delivering process dies at, all that it recorded arrives with the next start."""
    script = """
    queue = PerQueue()
    for n in range(4):
        user = f"{sys.argv[1]}-{n}"
        queue.record("GROUP", user)
        say(f"recorded {user}")
        queue.flush(20)
        say(f"flushed {user}")
    queue.close()
    """
    SQLiteOutbox(outbox, per.url).close()
    said = []
    for number in range(4, 40, rounds(6, 1)):
        wrapper = strace("-e", "trace=pwrite64", "-e", f"inject=pwrite64:signal=SIGKILL:when={number}")
        with Child(script, number, env=environment(outbox, per), wrapper=wrapper, measured=False) as child:
            child.wait(30)
            if "PTRACE" in child.errors().upper():
                pytest.skip(f"strace is not allowed to trace here: {child.errors()[-200:]}")
            said += child._output.rest()
        flushed = {line.split()[1] for line in said if line.startswith("flushed")}
        assert flushed <= set(users(per))
    make_queue(activity_type_id="TYPE").flush(20)
    recorded = {line.split()[1] for line in said if line.startswith("recorded")}
    assert recorded <= set(users(per))
    assert len(recorded) > 4
