"""The application's file stays the application's: its modes, its pragmas, its locks."""

import hashlib
import json
import os
import random
import shutil
import sqlite3
import stat
import threading
import time
from contextlib import closing
from types import SimpleNamespace

import pytest

from perqueue import OutboxError, PerQueue
from perqueue._outbox import OperatorOutbox, examine
from perqueue._outbox.disk import CHECKPOINT_COMMITS
from perqueue._outbox.finding import ok
from perqueue.exceptions import OutboxMismatch
from perqueue.sandbox import Refuse
from tests.helpers import Child, environment

PRAGMAS = ("application_id", "auto_vacuum", "encoding", "journal_mode", "page_size", "user_version")


def pragmas(path):
    with closing(sqlite3.connect(path)) as connection:
        return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in PRAGMAS}


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"], indirect=True)
def test_nothing_of_the_file_changes_but_its_tables(app, embed, connect, buy, mode):
    """Journal mode, page size, permissions, user_version and all: as they were, after all that happens."""
    connection = connect()
    connection.execute("PRAGMA user_version = 7")
    connection.execute("PRAGMA application_id = 12345")
    connection.close()
    app.chmod(0o640)
    before = pragmas(app)
    queue = embed()
    connection = connect()
    connection.execute(f"PRAGMA journal_mode = {mode}")  # TRUNCATE and PERSIST are a connection's own
    for n in range(20):
        queue.record("SHOP", f"PLAIN_{n}")
        buy(queue, connection, f"JOINED_{n}")
        connection.commit()
    queue.flush(20)
    assert connection.execute("PRAGMA journal_mode").fetchone() == (mode,)
    queue._outbox._mark()  # what a checkpoint of perqueue's own would begin with
    queue.close()
    assert pragmas(app) == before
    assert stat.S_IMODE(app.stat().st_mode) == 0o640
    with closing(sqlite3.connect(app)) as connection:
        names = {name for (name,) in connection.execute("SELECT tbl_name FROM sqlite_master")}
    assert {name for name in names if not name.startswith("perqueue_")} == {"orders"}


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_checkpoints_are_sqlites_own(app, embed, connect):
    """The log stays small though nobody but perqueue writes; it is not truncated under a reader's feet."""
    queue = embed(drain=False)
    wal = app.with_name("app.db-wal")
    most = 0
    for n in range(CHECKPOINT_COMMITS + 500):
        queue.record("SHOP", f"CUSTOMER_{n}")
        most = max(most, wal.stat().st_size)
    assert most < 8 * 2**20
    assert queue._outbox._disk._checkpointed == 0


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
def test_the_application_may_change_to_wal(app, embed, connect, buy, billed):
    """As Django does with each connection: perqueue goes on, and syncs as that mode needs."""
    queue = embed()
    queue.record("SHOP", "BEFORE").wait(10)
    connection = connect()
    assert connection.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    buy(queue, connection, "JOINED")
    connection.commit()
    queue.record("SHOP", "AFTER").wait(10)
    queue._outbox._check_identity(0)  # looked at every 0.1 s
    with queue._outbox._reading() as own:
        assert own.execute("PRAGMA synchronous").fetchone() == (1,)
    queue.flush(10)
    assert billed() == {"BEFORE", "JOINED", "AFTER"}


@pytest.mark.parametrize(
    ("durability", "levels"),
    [("process", {"delete": 2, "wal": 1}), ("power", {"delete": 3, "wal": 1})],
)
def test_commits_are_synced_as_the_journal_mode_needs(embed, mode, durability, levels):
    """Without a log at least FULL: less could damage the file. With one, the disk thread syncs."""
    queue = embed(durability=durability, drain=False)
    queue.record("SHOP", "CUSTOMER")
    with queue._outbox._reading() as own:
        assert own.execute("PRAGMA synchronous").fetchone() == (levels[mode],)
        assert own.execute("PRAGMA wal_autocheckpoint").fetchone() == (1000,)


def test_perqueue_never_opens_the_file_itself(app, per):
    """Closing any descriptor of it would drop the locks of the application's connections in that process."""
    script = """
    import sqlite3
    opened = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    queue = PerQueue(embedded=True, durability="power")
    application = sqlite3.connect(os.environ["PERQUEUE_OUTBOX"])
    for n in range(50):
        queue.record("SHOP", f"PLAIN_{n}")
        queue.record("SHOP", f"JOINED_{n}", connection=application)
        application.commit()
    queue.flush(20)
    queue.stats(), queue.history()
    if pid := os.fork():
        os.waitpid(pid, 0)
    queue.close()
    say([path for path in opened if path == os.environ["PERQUEUE_OUTBOX"]])
    os._exit(0)
    """
    with Child(script, env=environment(app, per), measured=False) as child:
        child.expect("[]")


# -- whose file it is


def test_the_application_creates_its_file(tmp_path, options):
    """A mistyped path is an error, not a new database; an empty one that it has just made will do."""
    with pytest.raises(OutboxMismatch, match="the application creates it"):
        PerQueue(tmp_path / "mistyped.db", embedded=True, **options)
    assert list(tmp_path.iterdir()) == []
    os.close(os.open(tmp_path / "new.db", os.O_CREAT, 0o644))
    with closing(sqlite3.connect(tmp_path / "new.db")) as connection:
        with PerQueue(tmp_path / "new.db", embedded=True, **options) as queue:
            connection.execute("CREATE TABLE orders (id)")
            queue.record("SHOP", "CUSTOMER")
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert stat.S_IMODE((tmp_path / "new.db").stat().st_mode) == 0o644


def test_whose_the_file_is_has_to_be_said(app, embed, tmp_path, options):
    """An application's file without embedded=True, or perqueue's own with it, is refused and left alone."""

    def digests():
        return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in tmp_path.glob("*.db")}

    PerQueue(tmp_path / "own.db", **options).close()
    before = digests()
    with pytest.raises(OutboxMismatch, match="say embedded=True"):
        PerQueue(app, **options)
    with pytest.raises(OutboxMismatch, match="leave out embedded"):
        embed(tmp_path / "own.db")
    assert digests() == before
    embed().close()
    before = digests()
    with pytest.raises(OutboxMismatch, match="application's database with perqueue's tables"):
        PerQueue(app, **options)
    assert digests() == before
    embed().close()


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_it_is_set_up_beside_an_open_transaction(embed, connect, monkeypatch):
    """Making the tables commits nothing of the application's; if it must wait too long, it says so."""
    connection = connect()
    connection.execute("INSERT INTO orders (customer) VALUES ('OPEN')")
    monkeypatch.setattr("perqueue._outbox.connection._SET_UP_TIMEOUT", 0.2)
    with pytest.raises(OutboxError, match=r"open for over 0.2 s: .* outside of transactions"):
        embed()
    assert connection.in_transaction
    connection.rollback()
    embed()
    assert connect().execute("SELECT count(*) FROM orders").fetchone() == (0,)


def test_six_processes_set_up_one_file_while_the_application_writes(app, per, mode):
    """The tables are made once, and everybody can use them."""
    script = """
    from tests.embedded.patience import be_patient
    be_patient()  # seven processes share the disk
    hear()
    queue = PerQueue(embedded=True, drain=False)
    queue.record("SHOP", f"CUSTOMER_{os.getpid()}")
    queue.close()
    """
    env = environment(app, per)
    done = threading.Event()

    def write():
        with closing(sqlite3.connect(app)) as connection:
            while not done.is_set():
                connection.execute("INSERT INTO orders (customer) VALUES ('OTHER')")
                connection.commit()
                time.sleep(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        children = [Child(script, env=env) for _ in range(6)]
        for child in children:
            child.tell("go")
        for child in children:
            with child:
                child.succeed(30)
    finally:
        done.set()
        writer.join()
    with closing(OperatorOutbox(app, None, create=False)) as outbox:
        assert outbox.position().pending == 6


# -- forks


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_a_child_with_an_inherited_connection_is_told(app, per):
    """SQLite's memory of the parent's locks is no lock: an error, where an acknowledged row could vanish."""
    script = """
    import sqlite3
    queue = PerQueue(embedded=True, drain=False)
    queue.record("SHOP", "PARENT")
    application = sqlite3.connect(os.environ["PERQUEUE_OUTBOX"])
    application.execute("SELECT count(*) FROM orders").fetchone()
    if os.fork() == 0:
        try:
            queue.record("SHOP", "CHILD")
        except OutboxError as error:
            say("close the application's connections before the fork" in str(error))
        os._exit(0)
    os.wait()
    queue.record("SHOP", "PARENT")
    application.close()
    if os.fork() == 0:
        queue.record("SHOP", "CHILD")
        queue.close()
        os._exit(0)
    os.wait()
    say(queue.stats().pending)
    os._exit(0)
    """
    with Child(script, env=environment(app, per), measured=False) as child:
        assert child.expect("") == "True"
        assert child.expect("") == "3"


# -- the command line, and a damaged file


def test_the_command_line_knows_an_embedded_outbox(app, embed, connect, buy, per, perqueue):
    """Every command works on the application's file, without being told, and leaves it as it is."""
    queue = embed(drain=False)
    connection = connect()
    buy(queue, connection, "JOINED")
    connection.commit()
    queue.close()
    before = pragmas(app)
    app.chmod(0o644)
    assert perqueue("record", "SHOP", "PLAIN", "-o", app).output == "2\n"
    assert json.loads(perqueue("status", "--json", "-o", app).output)["pending"] == 2
    per.set_fault(Refuse("unknown_user"), times=1)
    assert perqueue("drain", "-o", app).exit_code == 1
    assert perqueue("rejected", "requeue", "--all", "-o", app).exit_code == 0
    drained = perqueue("drain", "-o", app)
    assert (drained.exit_code, drained.output.startswith("delivered 1 ")) == (0, True), drained.output
    assert "JOINED" in perqueue("history", "-o", app).output
    assert perqueue("reconcile", "-o", app, "--start", "2018-01-01").exit_code == 0
    doctor = perqueue("doctor", "-o", app)
    assert doctor.exit_code == 0, doctor.output
    assert "the application's, with an outbox in it" in doctor.output
    assert len(per.activities) == 2
    assert pragmas(app) == before


IDLE = "queue = PerQueue(embedded=True, drain=False); queue.record('SHOP', 'CUSTOMER'); say('ready'); hear()"


def test_the_doctor_knows_who_has_the_file_open(app, per, perqueue, tmp_path):
    """Who has it open and is idle, without any lock on it, is named too: nothing is salvaged meanwhile."""
    with Child(IDLE, env=environment(app, per)) as child:
        child.expect("ready")
        assert f"open in process {child.pid}" in perqueue("doctor", "--offline", "-o", app).output
        result = perqueue("doctor", "-o", app, "--salvage", tmp_path / "rescued.db")
        assert result.exit_code == 1
        assert f"process {child.pid} uses" in result.stderr


def test_nobody_waits_for_the_doctor(app, embed, connect, buy, perqueue, monkeypatch):
    """While it reads all of the file the application commits, and so does record()."""
    queue, connection = embed(drain=False), connect(timeout=0)
    looked = []

    def structure(reader):
        buy(queue, connection, "JOINED")
        connection.commit()
        queue.record("SHOP", "PLAIN")
        looked.append(reader.execute("SELECT count(*) FROM perqueue_activity").fetchone())
        return ok("structure", "as found")

    monkeypatch.setattr(examine, "_structure", structure)
    result = perqueue("doctor", "--offline", "-o", app)
    assert result.exit_code == 0, result.output
    assert looked == [(0,)]
    assert queue.stats().pending == 2


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
def test_a_doctor_without_room_for_a_copy_says_so(app, embed, perqueue, monkeypatch):
    """Where the file cannot be copied aside it is not looked through: its writers would have to wait."""
    embed(drain=False).close()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    result = perqueue("doctor", "--offline", "-o", app)
    assert result.exit_code == 2
    assert "TMPDIR may name another place" in result.stderr


def test_what_is_legible_of_a_damaged_database_goes_into_an_outbox_of_its_own(
    app, embed, connect, buy, per, perqueue, tmp_path
):
    """`doctor --salvage` takes perqueue's rows, not the application's, and the new file can be drained."""
    queue = embed(drain=False)
    connection = connect()
    connection.execute("CREATE TABLE prices (id INTEGER PRIMARY KEY, a INT, b INT, c INT, note TEXT)")
    connection.execute("CREATE TABLE limits (id INTEGER PRIMARY KEY, a INT, b INT, note TEXT)")
    for n in range(50):
        buy(queue, connection, f"CUSTOMER_{n}")
        connection.execute("INSERT INTO prices VALUES (?, 1, 2, 3, 'x')", (n + 1,))
        connection.execute("INSERT INTO limits VALUES (?, 1, 2, 'x')", (n + 1,))
    connection.commit()
    connection.close()
    queue.close()
    new = tmp_path / "rescued.db"
    assert perqueue("doctor", "-o", app, "--salvage", new).exit_code == 0
    drained = perqueue("drain", "-o", new)
    assert drained.exit_code == 0, drained.output
    assert {activity.user_id for activity in per.activities} == {f"CUSTOMER_{n}" for n in range(50)}


@pytest.mark.parametrize(
    "pragma",
    ["encoding = 'UTF-16le'", "encoding = 'UTF-16be'", "page_size = 512", "page_size = 65536"],
)
def test_a_salvage_reads_whatever_form_the_application_gave_its_file(
    embed, connect, per, perqueue, tmp_path, mode, pragma
):
    """Encoding and page size are the application's: every activity is rescued from them, and delivered."""
    app = tmp_path / "of_its_own.db"
    connection = connect(app)
    for each in (pragma, f"journal_mode = {mode}"):
        connection.execute(f"PRAGMA {each}")
    connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT)")
    connection.commit()
    queue = embed(app, drain=False)
    users = {"ASCII", "Ünï", "😀", "x" * 400}
    for user in users:
        queue.record("SHOP", user)
    queue.close()
    connection.close()
    new = tmp_path / "rescued.db"
    salvaged = perqueue("doctor", "-o", app, "--salvage", new)
    assert salvaged.exit_code == 0, salvaged.output
    drained = perqueue("drain", "-o", new)
    assert drained.exit_code == 0, drained.output
    assert {activity.user_id for activity in per.activities} == users


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
def test_a_transaction_that_was_cut_short_is_not_looked_through(app, embed, connect, tmp_path, perqueue):
    """The doctor changes nothing, so it says who undoes it; the next `status` does, and all is well."""
    queue = embed(drain=False)
    queue.record("SHOP", "CUSTOMER")
    queue.close()
    folder = tmp_path / "killed"
    folder.mkdir()
    connection = connect()
    connection.execute("PRAGMA cache_size = 1")
    connection.execute("PRAGMA synchronous = FULL")
    noise = random.Random(7)
    connection.executemany(
        "INSERT INTO orders (customer) VALUES (?)", [(noise.randbytes(500).hex(),) for _ in range(200)]
    )
    for each in (app, app.with_name("app.db-journal")):  # what a kill would leave
        (folder / each.name).write_bytes(each.read_bytes())
    connection.rollback()
    found = perqueue("doctor", "-o", folder / "app.db")
    assert "a transaction was cut short" in found.output, found.output
    assert perqueue("status", "-o", folder / "app.db").exit_code == 0
    found = perqueue("doctor", "-o", folder / "app.db")
    assert "1 activity as recorded" in found.output, found.output
