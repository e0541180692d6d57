"""When the file is locked, gone, replaced or full, `record()` says so in time, and never lies."""

import os
import sqlite3
import time
from contextlib import closing

import pytest

from perqueue import OutboxError, PerQueue
from perqueue._outbox import SQLiteOutbox
from tests.helpers import Child, until

LOCKER = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
if len(sys.argv) > 2:
    time.sleep(float(sys.argv[2]))
else:
    sys.stdin.readline()
connection.execute("COMMIT")
"""


@pytest.fixture
def queue(make_queue):
    return make_queue(drain=False)


def test_lock_of_over_a_second_is_an_outbox_error(queue, outbox):
    """While another process holds the file, record() gives up after a second, and works again afterwards."""
    with Child(LOCKER, outbox, isolated=True) as locker:
        locker.expect("locked")
        began = time.monotonic()
        with pytest.raises(OutboxError, match="another process held its lock for over 1 s") as caught:
            queue.record("GROUP", "USER_1")
        took = time.monotonic() - began
        locker.tell("release")
        locker.succeed()
    assert 0.9 < took < 4
    assert caught.value.activity.user_id == "USER_1"
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    queue.record("GROUP", "USER_2")
    assert queue.stats().pending == 1


def test_shorter_lock_is_waited_out(queue, outbox):
    """A lock of less than a second only delays record()."""
    with Child(LOCKER, outbox, 0.4, isolated=True) as locker:
        locker.expect("locked")
        queue.record("GROUP", "USER")
        locker.succeed()
    assert queue.stats().pending == 1


def test_everybody_waits_a_second_at_most(queue, outbox):
    """Eight threads that meet a locked file all hear of it within about a second, not one after the other."""
    import threading

    took = []

    def record():
        began = time.monotonic()
        with pytest.raises(OutboxError):
            queue.record("GROUP", "USER")
        took.append(time.monotonic() - began)

    with Child(LOCKER, outbox, isolated=True) as locker:
        locker.expect("locked")
        threads = [threading.Thread(target=record) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(took) == 8
    assert max(took) < 4


def test_readers_are_no_obstacle(queue, outbox):
    """Somebody with a half-read query in the file (Datasette, say) delays nobody."""
    for n in range(100):
        queue.record("GROUP", f"USER_{n}")
    with closing(sqlite3.connect(outbox)) as reader:
        cursor = reader.execute("SELECT * FROM perqueue_activity")
        cursor.fetchone()
        began = time.monotonic()
        for n in range(100):
            queue.record("GROUP", f"USER_{n}")
        assert time.monotonic() - began < 5  # an obstacle would cost each of them a second
        cursor.close()


@pytest.mark.parametrize(
    "how", ["deleted", "renamed", "replaced by another outbox", "replaced by something else"]
)
def test_file_that_goes_away_is_noticed(queue, outbox, how):
    """Nothing is "recorded" into a file that nobody will find again, beyond the first 0.2 s (invariant 1)."""
    queue.record("GROUP", "USER")
    aside = outbox.with_name("aside.db")
    if how == "replaced by another outbox":
        SQLiteOutbox(aside, None).close()
    else:
        aside.write_text("ledger of the year 2017\n" * 100)
    if how == "deleted":
        outbox.unlink()
    elif how == "renamed":
        outbox.rename(outbox.with_name("moved.db"))
    else:
        aside.replace(outbox)
    last_success = gone = time.monotonic()
    errors = []
    while (called := time.monotonic()) < gone + 0.4:
        try:
            queue.record("GROUP", "USER")
        except OutboxError as error:
            errors.append(str(error))
        else:
            last_success = called
    assert last_success - gone < 0.21
    assert any(word in errors[0] for word in ("renamed or replaced", "was removed"))
    assert str(outbox) in errors[-1]


def test_file_that_comes_back_is_used_again(queue, outbox):
    """A file that was moved away by mistake can be moved back, and nothing needs a restart."""
    queue.record("GROUP", "USER_1")
    moved = {}
    for each in outbox.parent.iterdir():
        moved[each] = each.with_name(f"moved-{each.name}")
        each.rename(moved[each])

    def refused():
        try:
            queue.record("GROUP", "USER_2")
        except OutboxError:
            return True
        return False

    until(refused, "the missing file is noticed")
    for original, aside in moved.items():
        aside.rename(original)

    def recorded():
        try:
            queue.record("GROUP", "USER_3")
        except OutboxError:
            return False
        return True

    until(recorded, "the file is used again")
    with closing(sqlite3.connect(outbox)) as reader:
        users = [user for (user,) in reader.execute("SELECT user_id FROM perqueue_activity ORDER BY id")]
    assert (users[0], users[-1]) == ("USER_1", "USER_3")


def test_on_record_error_gets_the_error_instead(options, outbox):
    """A hot path can have storage errors by callback, and gets a receipt that raises when waited for."""
    errors = []
    queue = PerQueue(outbox, **{**options, "drain": False, "on_record_error": errors.append})
    os.truncate(outbox, 0)
    outbox.unlink()
    until(lambda: queue.record("GROUP", "USER") and errors, "the missing file is noticed")
    receipt = queue.record("GROUP", "USER_2")
    assert receipt.id == 0
    assert isinstance(errors[-1], OutboxError)
    assert errors[-1].activity.user_id == "USER_2"
    with pytest.raises(OutboxError):
        receipt.wait(1)
    queue.close()


def test_callback_that_fails_breaks_nothing(options, outbox, caplog):
    """A mistake in on_record_error is logged; record() still returns."""
    queue = PerQueue(outbox, **{**options, "drain": False, "on_record_error": lambda _: 1 / 0})
    outbox.unlink()
    until(lambda: queue.record("GROUP", "USER").id == 0, "the missing file is noticed")
    assert "a perqueue callback has failed" in caplog.text
    queue.close()


def test_read_only_file_is_told_as_such(tmp_path):
    """On a file that cannot be written, the error says what to look at."""
    path = tmp_path / "outbox.db"
    SQLiteOutbox(path, None).close()
    path.chmod(0o400)
    script = """
    from pathlib import Path
    from perqueue._outbox import SQLiteOutbox
    try:
        SQLiteOutbox(Path(sys.argv[1]), None).append("GROUP", "USER", "TYPE", 1)
    except OutboxError as error:
        say(error)
    """
    # The superuser writes everywhere, unless it gives that up.
    powerless = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    wrapper = powerless if os.geteuid() == 0 else ()
    with Child(script, path, wrapper=wrapper) as child:
        assert "owner, mode and mount" in child.expect("")
        child.succeed()


def test_garbage_in_the_file_is_an_outbox_error(make_queue, outbox):
    """A file that is overwritten underneath raises OutboxError, and never an error of sqlite3's own."""
    queue = make_queue(drain=False)
    for n in range(2000):
        queue.record("GROUP", f"USER_{n}")
    queue.close()
    size = outbox.stat().st_size
    with outbox.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(size - 4096))
    broken = None
    try:
        broken = make_queue(drain=False)
        broken.record("GROUP", "USER")
        broken.stats()
    except OutboxError as error:
        assert "damaged" in str(error)  # noqa: PT017 - it may come from any of the three
    else:
        pytest.fail("nobody noticed")


@pytest.mark.root
def test_full_disk_and_recovery(tmp_path, small_disk, options):
    """On a full disk record() raises OutboxError; what returned before is there, and space mends it."""
    path = small_disk / "outbox.db"
    ballast = small_disk / "ballast"
    queue = PerQueue(path, **{**options, "drain": False})
    recorded = 0
    ballast.write_bytes(b"x" * 400_000)
    with pytest.raises(OutboxError, match="disk is full"):  # noqa: PT012 - at some point
        while True:
            queue.record("GROUP", f"USER_{recorded:06}")
            recorded += 1
    ballast.unlink()
    queue.record("GROUP", "LATER")
    assert queue.stats().pending >= recorded + 1
    queue.close()
    with closing(sqlite3.connect(path)) as reader:
        users = {user for (user,) in reader.execute("SELECT user_id FROM perqueue_activity")}
        assert reader.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert users >= {f"USER_{n:06}" for n in range(recorded)} | {"LATER"}
