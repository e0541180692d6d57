"""The outbox as a file: who may read it, what is refused, what people find in it."""

import os
import random
import shutil
import signal
import sqlite3
import stat
import time
from contextlib import closing

import pytest
import sqlite_utils

from perqueue import ConfigurationError, OutboxError, PerQueue
from perqueue._activity import Event, Settlement
from perqueue._outbox import OperatorOutbox, SQLiteOutbox
from perqueue._outbox.schema import migrations
from perqueue.exceptions import OutboxMismatch
from perqueue.sandbox import Sandbox
from tests.helpers import Child, environment

ORIGIN = "https://api.useper.com"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outbox.db"


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def make(path, origin=ORIGIN, **options):
    return SQLiteOutbox(path, origin, **options)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_files_are_for_their_owner_alone(tmp_path, umask, mask):
    """The outbox and every file beside it have mode 0600, whatever the umask."""
    with Sandbox() as per:
        umask(mask)
        queue = PerQueue(
            tmp_path / "outbox.db",
            activity_token=per.activity_token,
            base_url=per.url,
            activity_type_id="TYPE",
        )
        queue.record("GROUP", "USER")
        queue.flush(10)
        umask(0o022)
        modes = {each.name: oct(stat.S_IMODE(each.stat().st_mode)) for each in tmp_path.iterdir()}
        queue.close()
    assert {"outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.db-drain.lock"} <= set(modes)
    assert set(modes.values()) == {"0o600"}, modes


def test_path_is_made_absolute(tmp_path, monkeypatch):
    """A relative path is that of the moment of construction, wherever the program goes afterwards."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    queue = PerQueue("outbox.db", drain=False, activity_type_id="TYPE")
    monkeypatch.chdir(tmp_path / "there")
    queue.record("GROUP", "USER")
    queue._outbox.before_fork()  # the connection is opened anew with the next use
    queue._outbox.after_fork_in_parent()
    queue.record("GROUP", "USER")
    assert queue.stats().pending == 2
    queue.close()
    assert not list((tmp_path / "there").iterdir())


def _text(path):
    path.write_text("ledger of the year 2017\n" * 100)


def _someone_elses(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE invoices (id INTEGER PRIMARY KEY)")
        connection.execute("INSERT INTO invoices VALUES (1)")
        connection.commit()


def _newer(path):
    make(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE perqueue_outbox SET schema_version = 99")
        connection.commit()


def _for_another_origin(path):
    make(path, "https://elsewhere.example").close()


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (_text, "not even a SQLite file"),
        (_someone_elses, "holds something else"),
        (_newer, "newer perqueue"),
        (_for_another_origin, "belongs to https://elsewhere.example, not to https://api.useper.com"),
    ],
)
def test_file_that_is_no_outbox_of_ours_is_refused_and_left_alone(path, prepare, says):
    """A file that cannot be this queue's outbox is refused with the reason, and not a byte of it changes."""
    prepare(path)
    before = path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode
    with pytest.raises(OutboxMismatch, match=says) as caught:
        PerQueue(path, drain=False, activity_type_id="TYPE")
    assert isinstance(caught.value, ConfigurationError)
    assert isinstance(caught.value, OutboxError)
    assert str(path) in str(caught.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode) == before
    assert not path.with_name("outbox.db-wal").exists()


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_what_is_no_file_is_refused_and_left_alone(path, kind):
    """A directory, a pipe or a device is not adopted, and keeps its mode."""
    if kind == "directory":
        path.mkdir(0o755)
    else:
        os.mkfifo(path, 0o644)
    mode = path.stat().st_mode
    with pytest.raises(OutboxMismatch, match="not a regular file"):
        make(path)
    assert path.stat().st_mode == mode


def test_outbox_in_a_missing_directory_is_an_outbox_error(tmp_path):
    """A directory that does not exist is told as such, not as an error of SQLite's."""
    with pytest.raises(OutboxError, match="directory does not exist"):
        make(tmp_path / "no" / "such" / "outbox.db")


def test_empty_file_is_adopted(path):
    """An empty file, as mktemp and container mounts leave it, becomes an outbox of mode 0600."""
    path.touch(0o644)
    with closing(make(path)) as outbox:
        assert outbox.append("GROUP", "USER", "TYPE", 1) == 1
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_symbolic_link_leads_to_one_outbox(path, tmp_path):
    """Two names of one file are one outbox with one drain lock (invariant 5)."""
    link = tmp_path / "link.db"
    make(path).close()
    link.symlink_to(path)
    with Sandbox() as per:
        shutil.rmtree(tmp_path / "none", ignore_errors=True)
        with pytest.raises(OutboxMismatch):  # the origin of the file behind the link
            PerQueue(link, drain=False, base_url=per.url)
    queue = PerQueue(link, drain=False, activity_type_id="TYPE")
    queue.record("GROUP", "USER")
    assert str(path) in repr(queue)
    queue.close()


def test_outbox_of_an_operator_knows_its_origin_from_the_file(path):
    """The command line opens an outbox without knowing whose it is, and never creates one."""
    with pytest.raises(OutboxMismatch, match="there is no outbox"):
        OperatorOutbox(path, None, create=False)
    assert not path.exists()
    make(path).close()
    with closing(OperatorOutbox(path, None, create=False)) as outbox:
        assert outbox.position().pending == 0


def test_six_processes_create_one_outbox_at_once(tmp_path):
    """Whoever comes first makes the file, and nobody hears "database is locked"."""
    script = """
    outboxes = iter(sys.argv[1:])
    say("ready")
    for path in outboxes:
        hear()
        queue = PerQueue(path, drain=False, activity_type_id="TYPE")
        queue.record("GROUP", f"USER_{os.getpid()}")
        queue.close()
        say("done")
    """
    paths = [tmp_path / f"outbox-{i}.db" for i in range(3)]
    children = [Child(script, *paths) for _ in range(6)]
    try:
        for child in children:
            child.expect("ready")
        for path in paths:
            for child in children:
                child.tell("go")
            for child in children:
                child.expect("done", timeout=20)
            with closing(make(path)) as outbox:
                assert outbox.position().pending == 6
        for child in children:
            assert child.succeed() == []
    finally:
        for child in children:
            child.__exit__(None, None, None)


def test_creation_that_was_cut_short_is_completed(path):
    """A kill -9 while the outbox is created, at any moment, leaves nothing that the next start refuses."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        migrations.ensure_migrations_table(sqlite_utils.Database(connection))
    with closing(make(path)) as outbox:
        assert outbox.append("GROUP", "USER", "TYPE", 1) == 1


def test_kill_while_creating(tmp_path):
    """Whenever a process dies while it creates the outbox, the next one can use it."""
    for attempt in range(20):
        path = tmp_path / f"outbox-{attempt}.db"
        pid = os.fork()
        if not pid:
            make(path)
            os._exit(0)
        time.sleep(random.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with closing(make(path)) as outbox:
            outbox.append("GROUP", "USER", "TYPE", 1)
            assert outbox.position().pending == 1


def test_anybody_can_read_the_file(path):
    """sqlite-utils opens the outbox; the view shows readable times, states and reasons for each activity."""
    moment = 1_700_000_000_123
    with closing(OperatorOutbox(path, ORIGIN)) as outbox:
        for user in ("pending", "accepted", "rejected", "discarded", "failed once"):
            outbox.append("GROUP", user, "TYPE", moment)
        pending, accepted, rejected, discarded, failed = outbox.claim(0, 10)
        assert pending.user_id == "pending"

        def settle(activity, event, **more):
            settlement = Settlement(
                activity=activity, event=event, answered_at=moment + 1000, duration_ms=20, **more
            )
            outbox.settle([settlement], drained_through=0, refusals=(0, None))

        settle(accepted, Event.DEFER, reason="HTTP 503")
        settle(accepted, Event.ACCEPT, transaction_id="TRANSACTION")
        settle(rejected, Event.REJECT, reason="no_such_type")
        settle(discarded, Event.REJECT, reason="no_such_type")
        settle(failed, Event.DEFER, reason="HTTP 502", not_before=moment + 5000)
        outbox.discard([discarded.id])
    database = sqlite_utils.Database(path)
    rows = {row["user_id"]: row for row in database["perqueue_activity_log"].rows}
    assert database["perqueue_activity"].use_rowid is False
    assert [row["integrity_check"] for row in database.query("PRAGMA integrity_check")] == ["ok"]
    database.close()
    assert {user: row["state"] for user, row in rows.items()} == {
        "pending": "pending",
        "accepted": "accepted",
        "rejected": "rejected",
        "discarded": "discarded",
        "failed once": "pending",
    }
    assert rows["accepted"] == {
        "id": 2,
        "billing_id": "GROUP",
        "user_id": "accepted",
        "activity_type_id": "TYPE",
        "state": "accepted",
        "recorded_at": "2023-11-14T22:13:20.123Z",
        "settled_at": "2023-11-14T22:13:21.123Z",
        "attempts": 2,
        "transaction_id": "TRANSACTION",
        "reason": None,
    }
    assert rows["pending"]["settled_at"] is None
    assert (rows["failed once"]["attempts"], rows["failed once"]["reason"]) == (1, "HTTP 502")
    assert rows["rejected"]["reason"] == rows["discarded"]["reason"] == "no_such_type"


def test_file_on_a_closed_outbox_is_complete(path):
    """After close() everything stands in the one file: it can be copied without its -wal."""
    with closing(make(path)) as outbox:
        for n in range(100):
            outbox.append("GROUP", f"USER_{n}", "TYPE", int(time.time() * 1000))
    assert not path.with_name("outbox.db-wal").exists()
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    with closing(make(copy)) as outbox:
        assert outbox.position().pending == 100


def test_child_environment_leads_to_the_outbox(path):
    """PERQUEUE_OUTBOX, PERQUEUE_DRAIN and PER_ACTIVITY_TYPE_ID are enough to record in another process."""
    with Child(
        "PerQueue().record('GROUP', 'USER')", env=environment(path, None, PERQUEUE_DRAIN="false")
    ) as child:
        child.succeed()
    with closing(make(path)) as outbox:
        assert outbox.position().pending == 1


@pytest.mark.parametrize("what", ["vacuumed", "moved", "moved after kill -9"])
def test_file_is_kept_in_order_by_its_owner(what, outbox, make_queue, per, tmp_path):
    """An outbox that was vacuumed or moved while nobody used it delivers what was pending, and counts on."""
    queue = make_queue()
    for number in range(5):
        queue.record("GROUP_A", f"USER_{number}")
    queue.flush()
    queue.close()
    if what == "moved after kill -9":
        with Child("PerQueue(drain=False).record('GROUP_A', 'USER_5')\nos.kill(os.getpid(), 9)",
                   env=environment(outbox, per)) as child:  # fmt: skip
            child.wait()
        assert outbox.with_name(f"{outbox.name}-wal").stat().st_size
    else:
        queue = make_queue(drain=False)
        queue.record("GROUP_A", "USER_5")
        queue.close()
    place = outbox
    if what == "vacuumed":
        with closing(sqlite3.connect(outbox)) as connection:
            connection.execute("VACUUM")
    else:
        place = tmp_path / "elsewhere" / "moved.db"
        place.parent.mkdir()
        for suffix in ("", "-wal", "-shm"):
            if (old := outbox.with_name(outbox.name + suffix)).exists():
                old.rename(place.with_name(place.name + suffix))
    with make_queue(place) as queue:
        assert (queue.stats().pending, queue.stats().delivered) == (1, 5)
        queue.record("GROUP_A", "USER_6")
    assert sorted(activity.user_id for activity in per.activities) == [f"USER_{n}" for n in range(7)]


def test_a_damaged_one_stands_for_no_other(path):
    """With `coalesce`, one that turns out to be damaged is recorded anew, in this process, too."""
    key, window = ("GROUP", "USER", "TYPE"), (0, 10)
    with closing(make(path)) as outbox:
        first, known = outbox.append_once(key, window, 1), outbox.refusals()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE perqueue_activity SET user_id = 'OTHER'")
        assert outbox.claim(0, 5) == []
        assert outbox.refusals() != known  # what this process remembers of windows is asked anew
        assert outbox.append_once(key, window, 2) != first
