"""Where the outbox lies: what cannot be written, goes away, does not last, or is not this user's."""

import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from perqueue import OutboxError, PerQueue
from perqueue import _place as place
from perqueue._lock import drain_lock, is_drained
from perqueue._outbox import OperatorOutbox, SQLiteOutbox
from perqueue.exceptions import OutboxMismatch
from tests.faults._disks import allowed, mounted, tool
from tests.helpers import Child, environment, least, quickest, until

ORIGIN = "https://api.useper.com"
NOBODY = 65534
SOMEBODY = 12345

RECORD_WHEN_TOLD = """
    queue = PerQueue(drain=False)
    say("ready")
    while user := hear():
        began = time.monotonic()
        try:
            queue.record("GROUP", user)
            say("recorded")
        except OutboxError as error:
            say(f"{time.monotonic() - began} {error}")
"""


@pytest.fixture
def folder():
    """A folder that every user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(dir="/tmp", prefix="perqueue-place-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@contextmanager
def immutable(path):
    """Take from everybody, the superuser included, the right to change a file."""
    allowed("chattr", "+i", path)
    try:
        yield
    finally:
        subprocess.run([tool("chattr"), "-i", path], check=True)


@contextmanager
def read_only_mount(path):
    """Make the file system of a folder read-only."""
    allowed("mount", "--bind", path, path)
    try:
        allowed("mount", "-o", "remount,bind,ro", path)
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextmanager
def forbidden(path):
    """Take from the owner the right to open a file."""
    path.chmod(0o000)
    try:
        yield
    finally:
        path.chmod(0o600)


def make(path, **options):
    return SQLiteOutbox(path, ORIGIN, **options)


def powerless():
    """Return the command line that takes from the superuser what other users do not have either."""
    return [tool("setpriv"), "--bounding-set", "-dac_override,-dac_read_search"]


# -- what cannot be written


def refused(child, user):
    """Have it recorded by a child, which must hear in less than a second that it cannot be."""

    def seconds():
        nonlocal text
        child.tell(user)
        took, text = child.expect("").split(maxsplit=1)
        return float(took)

    text = None
    assert least(seconds, 1) < 1
    return text


def refused_at_once(attempt, words="owner, mode and mount"):
    """Assert that this is refused, without a wait for a lock."""

    def refused():
        with pytest.raises(OutboxError, match=words):
            attempt()

    assert quickest(refused, 1) < 1


def record_once(path):
    """Come to an outbox, and record."""
    with closing(make(path)) as outbox:
        return outbox.append("GROUP", "USER", "TYPE", 1)


@pytest.mark.root
def test_immutable_outbox(outbox):
    """Whoever comes to an outbox that nobody may change hears so at once."""
    assert record_once(outbox) == 1
    with immutable(outbox):
        refused_at_once(lambda: record_once(outbox))
    assert record_once(outbox) == 2


@pytest.mark.root
@pytest.mark.parametrize("name", ["outbox.db", "outbox.db-wal", "."])
def test_outbox_that_becomes_immutable(tmp_path, name):
    """Whatever becomes immutable under a recorder: what it has recorded is there, or it raised at once."""
    path = tmp_path / "outbox.db"
    outcomes = []
    with Child(RECORD_WHEN_TOLD, env=environment(path, None)) as child:
        child.expect("ready")
        child.tell("BEFORE")
        child.expect("recorded")
        with immutable(tmp_path / name):
            for n in range(50):
                child.tell(f"USER_{n}")
                outcomes.append(child.expect(""))
        child.tell("AFTER")
        child.expect("recorded")
        child.kill()
    recorded = {f"USER_{n}" for n, outcome in enumerate(outcomes) if outcome == "recorded"}
    late = [outcome for outcome in outcomes if outcome != "recorded" and float(outcome.split()[0]) >= 1]
    assert len(late) <= 1  # the machine itself may stand still for once
    with closing(sqlite3.connect(path)) as reader:
        users = {user for (user,) in reader.execute("SELECT user_id FROM perqueue_activity")}
    assert recorded | {"BEFORE", "AFTER"} <= users


@pytest.mark.root
def test_read_only_file_system(tmp_path):
    """Whoever comes to an outbox on a read-only file system hears so at once."""
    folder = tmp_path / "disk"
    folder.mkdir()
    assert record_once(folder / "outbox.db") == 1
    with read_only_mount(folder):
        refused_at_once(lambda: record_once(folder / "outbox.db"))
    assert record_once(folder / "outbox.db") == 2


@pytest.mark.root
def test_directory_that_takes_no_files(tmp_path):
    """Where no file can be made that is said at once, and not after a wait for a lock."""
    with read_only_mount(tmp_path):
        refused_at_once(lambda: make(tmp_path / "outbox.db"))


@pytest.mark.parametrize("name", ["/proc/outbox.db", "/proc/self/outbox.db", "/sys/outbox.db"])
def test_directory_of_the_kernel(name):
    """A path where nobody can make a file is an OutboxError at once."""
    if not Path(name).parent.is_dir():
        pytest.skip(f"there is no {Path(name).parent}")
    refused_at_once(lambda: make(Path(name)), None)


def test_permission_that_is_lost(outbox):
    """A recorder whose file is closed to it, after a fork say, hears so at once, and goes on afterwards."""
    script = """
    queue = PerQueue(drain=False)
    say("ready")
    while user := hear():
        os.waitpid(os.fork() or os._exit(0), 0)  # the file is opened anew after it
        began = time.monotonic()
        try:
            queue.record("GROUP", user)
            say("recorded")
        except OutboxError as error:
            say(f"{time.monotonic() - began} {error}")
    """
    wrapper = powerless() if os.geteuid() == 0 else ()
    with Child(script, env=environment(outbox, None), wrapper=wrapper, measured=False) as child:
        child.expect("ready")
        child.tell("USER_1")
        child.expect("recorded")
        with forbidden(outbox):
            assert "owner, mode and mount" in refused(child, "USER_2")
        child.tell("USER_3")
        child.expect("recorded")
        child.kill()
    with closing(make(outbox)) as again:
        assert again.position().pending == 2


# -- what goes away


@pytest.mark.parametrize("how", ["rm", "mv", "mv directory"])
def test_file_that_goes_away(tmp_path, how):
    """Once its file was deleted or moved, the very next record() raises, and all others."""
    home = tmp_path / "home"
    home.mkdir()
    path = home / "outbox.db"
    with Child(RECORD_WHEN_TOLD, env=environment(path, None)) as child:
        child.expect("ready")
        child.tell("USER")
        child.expect("recorded")
        if how == "rm":
            path.unlink()
        elif how == "mv":
            path.rename(home / "moved.db")
        else:
            home.rename(tmp_path / "moved")
        text = refused(child, "USER")
        assert "renamed or replaced" in text or "was removed" in text
        refused(child, "USER")
        child.kill()


# -- what does not last


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.name == "perqueue"]


@pytest.fixture
def fresh(monkeypatch):
    """As in a new process: no place was warned of yet."""
    monkeypatch.setattr(place, "_warned", set())


@pytest.mark.root
@pytest.mark.usefixtures("fresh")
def test_outbox_in_memory_is_warned_of_once(tmp_path, caplog):
    """An outbox on tmpfs works, and is warned of with the remedy: once, however many are opened there."""
    with mounted(tmp_path / "a b", "-t", "tmpfs", "none") as folder:
        for name in ("one.db", "one.db", "two.db"):
            make(folder / name).close()
        assert len(warnings_of(caplog)) == 1
        assert f"outbox {folder}/one.db lies in memory" in warnings_of(caplog)[0]
        assert "put it on a disk" in warnings_of(caplog)[0]
        OperatorOutbox(folder / "one.db", None, create=False).close()
    assert len(warnings_of(caplog)) == 1


@pytest.mark.root
@pytest.mark.usefixtures("fresh")
def test_outbox_in_a_container_layer_is_warned_of(tmp_path, caplog):
    """An outbox on an overlay, a container's own layer, is warned of: put it on a volume."""
    for name in ("lower", "upper", "work"):
        (tmp_path / name).mkdir()
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with mounted(tmp_path / "merged", "-t", "overlay", "-o", layers, "none") as folder:
        with closing(make(folder / "outbox.db")) as outbox:
            assert outbox.append("GROUP", "USER", "TYPE", 1) == 1
        assert len(warnings_of(caplog)) == 1
        assert "put it on a volume" in warnings_of(caplog)[0]
        # What is mounted in it lasts, and is not meant.
        with mounted(folder / "volume", "--bind", tmp_path / "lower"):
            make(folder / "volume" / "outbox.db").close()
        assert len(warnings_of(caplog)) == 1


@pytest.mark.usefixtures("fresh")
def test_ordinary_disk_is_not_warned_of(outbox, caplog, monkeypatch):
    """An outbox on a disk is opened in silence."""
    monkeypatch.setattr(place, "_mounts", lambda: iter([("/", "ext4")]))
    make(outbox).close()
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "ceph", "sshfs"])
def test_network_file_system_is_refused(outbox, monkeypatch, kind):
    """An outbox on a network file system, where SQLite's log cannot work, is refused before it is made."""
    monkeypatch.setattr(place, "_mounts", lambda: iter([("/", "ext4"), (str(outbox.parent), kind)]))
    with pytest.raises(OutboxMismatch, match=f"network file system \\({kind}\\).*local disk"):
        make(outbox)
    assert not outbox.exists()


@pytest.mark.usefixtures("fresh")
def test_folder_of_the_host_is_warned_of(outbox, monkeypatch, caplog):
    """A folder that a virtual machine shares with its host works, with a warning."""
    monkeypatch.setattr(place, "_mounts", lambda: iter([("/", "virtiofs")]))
    make(outbox).close()
    assert "shared with this machine's host" in warnings_of(caplog)[0]


def test_no_mount_table_is_no_obstacle(outbox, monkeypatch):
    """Where the mounts cannot be read, as elsewhere than on Linux, nothing is said of them."""
    monkeypatch.setattr(place, "_mounts", lambda: iter(()))
    make(outbox).close()


@pytest.mark.root
def test_file_mounted_without_its_directory_is_refused(tmp_path):
    """A file that is mounted by itself is refused: its write-ahead log would lie in the container."""
    original, path = tmp_path / "original.db", tmp_path / "outbox.db"
    make(original).close()
    path.touch()
    allowed("mount", "--bind", original, path)
    try:
        with pytest.raises(OutboxMismatch, match="mount its directory"):
            make(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


# -- what is not this user's


def as_user(user, path, *, create=True):
    """Open and use the outbox as somebody else; return what that said."""
    import filelock  # noqa: F401 - what is needed is loaded while it can be read

    import perqueue._outbox.schema  # noqa: F401

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            with closing(make(path, create=create)) as outbox:
                said = f"recorded {outbox.append('GROUP', 'USER', 'TYPE', 1)}"
        except BaseException as error:  # noqa: BLE001
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.root
def test_outbox_of_another_user_is_refused(folder):
    """An outbox that belongs to somebody else is refused, even where its mode would let one write."""
    path = folder / "outbox.db"
    make(path).close()
    os.chown(path, NOBODY, NOBODY)
    path.chmod(0o666)
    folder.chmod(0o777)
    os.chown(folder, SOMEBODY, SOMEBODY)
    assert "OutboxMismatch" in as_user(SOMEBODY, path)
    folder.chmod(0o755)
    assert "belongs to another user" in as_user(SOMEBODY, path)
    os.chown(path, SOMEBODY, SOMEBODY)
    assert as_user(SOMEBODY, path) == "recorded 1"


@pytest.mark.root
def test_superuser_leaves_the_outbox_to_its_owner(folder):
    """What the superuser does with somebody's outbox leaves that user every file that recording needs."""
    os.chown(folder, SOMEBODY, SOMEBODY)
    path = folder / "outbox.db"
    assert as_user(SOMEBODY, path) == "recorded 1"
    (folder / "outbox.db-setup.lock").unlink()
    with closing(OperatorOutbox(path, None, create=False)) as outbox:
        outbox.append("GROUP", "ROOT", "TYPE", 1)
        place.make_for_owner(f"{path}-setup.lock", path)
        owners = {each.name: each.stat().st_uid for each in folder.iterdir()}
        assert {"outbox.db", "outbox.db-wal", "outbox.db-shm", "outbox.db-setup.lock"} <= set(owners)
        assert set(owners.values()) == {SOMEBODY}
        assert as_user(SOMEBODY, path) == "recorded 3"
    assert as_user(SOMEBODY, path) == "recorded 4"


@pytest.mark.root
def test_superuser_who_delivers_leaves_the_lock_to_the_owner(folder):
    """The drain lock of a superuser who delivers for somebody is that user's: delivery goes on afterwards."""
    os.chown(folder, SOMEBODY, SOMEBODY)
    path = folder / "outbox.db"
    assert as_user(SOMEBODY, path) == "recorded 1"
    with drain_lock(path):
        assert (folder / "outbox.db-drain.lock").stat().st_uid == SOMEBODY
        assert is_drained(path)


@pytest.mark.root
def test_superuser_who_completes_an_outbox_leaves_it_to_its_owner(folder):
    """A set-up that the superuser finishes for somebody is that user's, with every file of it."""
    os.chown(folder, SOMEBODY, SOMEBODY)
    path = folder / "outbox.db"
    path.touch(0o600)
    os.chown(path, SOMEBODY, SOMEBODY)
    make(path).close()
    assert {each.stat().st_uid for each in folder.iterdir()} == {SOMEBODY}
    assert as_user(SOMEBODY, path) == "recorded 1"


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_symbolic_link_in_a_public_directory_is_refused(tmp_path, mode):
    """A link that anybody could have planted is not followed; nothing is made where it leads."""
    public, private = tmp_path / "public", tmp_path / "private"
    for each in (public, private):
        each.mkdir()
    public.chmod(mode)
    (public / "outbox.db").symlink_to(private / "victim")
    (public / "link").symlink_to(private)
    for path in (public / "outbox.db", public / "link" / "outbox.db"):
        with pytest.raises(OutboxMismatch, match="symbolic link"):
            make(path)
        with pytest.raises(OutboxMismatch, match="symbolic link"):
            PerQueue(path, drain=False)
    assert list(private.iterdir()) == []


@pytest.mark.parametrize("suffix", ["-wal", "-setup.lock", "-drain.lock"])
def test_file_planted_beside_the_outbox_is_refused(tmp_path, suffix):
    """In a public directory the files beside the outbox are as suspect as the outbox itself."""
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o1777)
    path = public / "outbox.db"
    make(path).close()
    beside = Path(f"{path}{suffix}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(tmp_path / "victim")
    with pytest.raises(OutboxMismatch, match="anybody could have made it"):
        make(path)
    assert not (tmp_path / "victim").exists()


@pytest.mark.root
def test_superuser_is_not_led_astray_either(tmp_path):
    """In a public directory the superuser refuses an outbox that another user has put there."""
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o1777)
    path = public / "outbox.db"
    make(path).close()
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(OutboxMismatch, match=f"another user \\({NOBODY}"):
        make(path)


@pytest.mark.parametrize("mode", [0o700, 0o770, 0o2775, 0o777])
def test_directories_of_volumes_are_accepted(tmp_path, mode):
    """A directory that its group or everybody may write, as volumes of Kubernetes are, will do."""
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(mode)
    for _ in range(2):
        with closing(make(volume / "outbox.db")) as outbox:
            outbox.append("GROUP", "USER", "TYPE", 1)
    assert {stat.S_IMODE(each.stat().st_mode) for each in volume.iterdir()} == {0o600}


def test_own_symbolic_link_elsewhere_is_followed_once(tmp_path):
    """A link in a directory of one's own is followed when the outbox is opened, and not again."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    link = tmp_path / "current"
    link.symlink_to(tmp_path / "first")
    with closing(make(link / "outbox.db")) as outbox:
        assert outbox.path == tmp_path / "first" / "outbox.db"
        outbox.append("GROUP", "USER_1", "TYPE", 1)
        link.unlink()
        link.symlink_to(tmp_path / "second")
        outbox.before_fork()  # the connection is opened anew with the next use
        outbox.after_fork_in_parent()
        outbox.append("GROUP", "USER_2", "TYPE", 2)
        until(lambda: outbox.position().pending == 2, "both are in one file")
    assert list((tmp_path / "second").iterdir()) == []
