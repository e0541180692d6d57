"""Looking at an outbox from outside leaves everything as it was."""

import os
import shutil
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest

from perqueue._outbox import OperatorOutbox
from perqueue._outbox import look as looking
from perqueue._outbox.look import NEWEST, FileOnlooker
from perqueue.exceptions import OutboxError
from tests.helpers import Child, environment


def _held_open(path):
    names = set()
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            names.add(str(link.readlink()))
    return {name for name in names if name.startswith(str(path))}


@pytest.fixture
def onlooker(outbox, make_queue):
    """Somebody who looks at the test's outbox from outside; nobody has it open."""
    make_queue(drain=False).close()
    return FileOnlooker(outbox)


@pytest.fixture
def abandoned(onlooker, outbox, per):
    """A process has recorded twenty and was killed: they are in the write-ahead log alone."""
    script = """
        queue = PerQueue(drain=False)
        for number in range(20):
            queue.record("GROUP_A", f"USER_{number}")
        say("done")
        hear()
    """
    with Child(script, env=environment(outbox, per), measured=False) as child:
        child.expect("done")
    return outbox


def _bytes(outbox):
    return {path.name: path.read_bytes() for path in (outbox, outbox.with_name(f"{outbox.name}-wal"))}


def test_nothing_stays_open_between_two_looks(onlooker, outbox):
    """Who looks keeps neither the file nor a lock on it from one look to the next."""
    onlooker.look()
    assert _held_open(outbox) == set()
    with closing(OperatorOutbox(outbox, None, create=False)):  # who holds it open is seen
        assert str(outbox) in _held_open(outbox)


def test_a_look_writes_nothing(onlooker, abandoned, tmp_path):
    """A look at what a killed process left moves nothing out of the write-ahead log."""
    before = _bytes(abandoned)
    assert onlooker.look().position.pending == 20
    assert _bytes(abandoned) == before
    copy = shutil.copytree(abandoned.parent, tmp_path / "copy") / abandoned.name
    OperatorOutbox(copy, None, create=False).close()  # as any other last one to close it does
    assert not copy.with_name(f"{copy.name}-wal").exists()


def test_a_writer_is_not_waited_for(outbox, make_queue):
    """A look sees the last commit while another process is in the middle of a transaction."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    onlooker = FileOnlooker(outbox)
    with closing(sqlite3.connect(outbox, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE perqueue_drain SET accepted = 1")
        assert onlooker.look().position.accepted == 0
        writer.execute("ROLLBACK")


def test_a_look_costs_the_same_however_much_there_is(outbox, make_queue, per):
    """Of answers only the newest are read, by their keys, and no query sorts or scans a table."""
    queue = make_queue()
    for number in range(NEWEST + 50):
        queue.record("GROUP_A", f"USER_{number}")
    queue.flush()
    look = FileOnlooker(outbox).look()
    assert (look.position.accepted, len(look.answers)) == (NEWEST + 50, NEWEST)
    with closing(sqlite3.connect(outbox)) as connection:
        for query in (looking._ANSWERS, looking._FAILURES, looking._REFUSALS):
            plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}", (NEWEST,)))
            assert "TEMP B-TREE" not in plan
        plan = " ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {looking._NEXT_DUE}"))
        assert "USING COVERING INDEX" in plan


def test_an_empty_file_keeps_what_is_beside_it(onlooker, abandoned):
    """A file that was emptied is an error, and its write-ahead log is not deleted by looking."""
    wal = abandoned.with_name(f"{abandoned.name}-wal")
    size = wal.stat().st_size
    os.truncate(abandoned, 0)
    with pytest.raises(OutboxError, match="empty"):
        onlooker.look()
    assert wal.stat().st_size == size > 0


def test_a_file_that_is_gone_is_not_made_again(onlooker, outbox):
    """A look at a file that was removed says so, and leaves no new one."""
    outbox.unlink()
    with pytest.raises(OutboxError, match="removed"):
        onlooker.look()
    assert not outbox.exists()
