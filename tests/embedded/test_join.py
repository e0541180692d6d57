"""`record(connection=...)` on sqlite3's own connections: the activity exists exactly when the order does."""

import os
import sqlite3
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta

import pytest

from perqueue import (
    ActivityRejected,
    ConfigurationError,
    InvalidActivity,
    OutboxError,
    OutboxFull,
    PerQueue,
    PerQueueError,
    QueueClosed,
)
from perqueue._outbox import OperatorOutbox
from perqueue.sandbox import Hang, Refuse

IMPLICIT = [{}, {"isolation_level": "IMMEDIATE"}]
if sys.version_info >= (3, 12):
    IMPLICIT.append({"autocommit": False})
AUTOCOMMIT = [{"isolation_level": None}]
if sys.version_info >= (3, 12):
    AUTOCOMMIT.append({"autocommit": True})


@pytest.mark.parametrize("manner", IMPLICIT, ids=str)
def test_committed_with_the_order_and_rolled_back_with_it(queue, connect, buy, customers, billed, manner):
    """What is rolled back was never recorded, what is committed is delivered: no more and no less."""
    connection = connect(**manner)
    buy(queue, connection, "UNDONE")
    connection.rollback()
    buy(queue, connection, "DONE")
    connection.commit()
    buy(queue, connection, "UNDONE_TOO")
    connection.rollback()
    queue.flush(10)
    assert billed() == customers() == {"DONE"}
    assert (queue.stats().delivered, queue.stats().pending) == (1, 0)


@pytest.mark.parametrize("manner", AUTOCOMMIT, ids=str)
def test_in_autocommit_mode_the_application_begins_or_it_commits_at_once(
    queue, connect, buy, customers, billed, manner
):
    """Without an open transaction it commits at once; with one the application began, as that ends."""
    connection = connect(**manner)
    buy(queue, connection, "AT_ONCE")
    assert not connection.in_transaction
    connection.execute("BEGIN")
    buy(queue, connection, "UNDONE")
    connection.execute("ROLLBACK")
    connection.execute("BEGIN IMMEDIATE")
    buy(queue, connection, "DONE")
    connection.execute("COMMIT")
    queue.flush(10)
    assert billed() == customers() == {"AT_ONCE", "DONE"}


def test_nothing_is_delivered_before_the_commit(queue, connect, buy, per, until):
    """The drain sees nothing of an open transaction, and delivers what it held soon after its commit."""
    connection = connect()
    buy(queue, connection, "CUSTOMER")
    queue.flush(5)  # covers what is committed: nothing
    assert (queue.stats().pending, per.activities) == (0, ())
    connection.commit()
    until(lambda: len(per.activities) == 1)


def test_a_savepoint_takes_its_activities_with_it(queue, connect, buy, customers, billed):
    """What is rolled back to a savepoint is gone, though the transaction is committed."""
    connection = connect()
    buy(queue, connection, "BEFORE")
    connection.execute("SAVEPOINT attempt")
    buy(queue, connection, "UNDONE")
    connection.execute("ROLLBACK TO attempt")
    connection.execute("RELEASE attempt")
    buy(queue, connection, "AFTER")
    connection.commit()
    queue.flush(10)
    assert billed() == customers() == {"BEFORE", "AFTER"}


def test_recording_leaves_the_transaction_to_its_owner(queue, connect, buy):
    """Nothing is begun that the library would not begin, nothing committed; its rows may be of any kind."""
    connection = connect()
    connection.row_factory = lambda cursor, row: {"row": row}
    connection.text_factory = bytes
    first = buy(queue, connection, "CUSTOMER")
    assert connection.in_transaction
    second = buy(queue, connection, "CUSTOMER")
    assert second.id == first.id + 1
    connection.rollback()
    assert not connection.in_transaction


# -- a number that is given again


@pytest.mark.parametrize("coalesce", [None, timedelta(days=1)], ids=["each", "once"])
def test_converters_of_the_application_make_nothing_of_an_id(embed, connect, monkeypatch, coalesce):
    """One that makes something else of each INTEGER is not asked about perqueue's numbers."""
    monkeypatch.setitem(sqlite3.converters, "INTEGER", bytes.hex)
    queue = embed(coalesce=coalesce, drain=False)
    connection = connect(detect_types=sqlite3.PARSE_DECLTYPES)
    given = [queue.record("SHOP", "CUSTOMER", connection=connection).id for _ in range(2)]
    connection.commit()
    assert given == [1, 2 if coalesce is None else 1]


def test_a_receipt_never_speaks_of_another_activity(queue, connect, buy, until):
    """The number of one that was rolled back is given again; its receipt says so rather than lie."""
    connection = connect()
    undone = buy(queue, connection, "UNDONE")
    connection.rollback()
    done = queue.record("SHOP", "ANOTHER")
    assert done.id == undone.id
    transaction_id = done.wait(10)
    with pytest.raises(PerQueueError, match="after the commit, flush"):
        undone.wait(0)
    assert transaction_id


def test_a_receipt_cannot_be_waited_for_within_the_transaction(queue, connect, buy):
    """Waiting for what only the caller can commit is an error at once, not a wait for ever."""
    connection = connect()
    receipt = buy(queue, connection, "CUSTOMER")
    with pytest.raises(PerQueueError, match="part of a transaction"):
        receipt.wait(None)


def test_a_rollback_leaves_no_trace_in_memory(embed, connect, buy, billed):
    """Numbers, counts and limits go on after rollbacks as if nothing had been, joined or not."""
    queue = embed(max_pending=5, drain=False)
    connection = connect()
    for _ in range(20):
        assert buy(queue, connection, "UNDONE").id == 1
        connection.rollback()
    assert queue.stats().pending == 0
    assert [queue.record("SHOP", f"PLAIN_{n}").id for n in range(2)] == [1, 2]
    for n in range(2):
        buy(queue, connection, f"JOINED_{n}")
    connection.commit()
    buy(queue, connection, "UNDONE")
    connection.rollback()
    assert queue.record("SHOP", "PLAIN_2").id == 5
    assert queue.stats().pending == 5
    with pytest.raises(OutboxFull):
        queue.record("SHOP", "TOO_MANY")
    with pytest.raises(OutboxFull) as caught:
        queue.record("SHOP", "TOO_MANY", connection=connection)
    assert caught.value.activity.user_id == "TOO_MANY"
    connection.rollback()
    with embed(max_pending=5) as drains:
        drains.flush(10)
    assert billed() == {"PLAIN_0", "PLAIN_1", "JOINED_0", "JOINED_1", "PLAIN_2"}
    assert buy(queue, connection, "AGAIN").id == 6


def test_max_pending_counts_what_the_transaction_holds(embed, connect, buy):
    """One transaction cannot pass the limit either; what it has recorded stays in it."""
    queue = embed(max_pending=3, drain=False)
    connection = connect()
    for n in range(3):
        buy(queue, connection, f"CUSTOMER_{n}")
    with pytest.raises(OutboxFull):
        queue.record("SHOP", "TOO_MANY", connection=connection)
    connection.commit()
    assert queue.stats().pending == 3


# -- coalescing


def test_a_window_that_is_rolled_back_swallows_nothing(embed, connect, buy, customers, billed):
    """The first of a window stands for the others only once it is committed."""
    queue = embed(coalesce=timedelta(days=1))
    connection = connect()
    buy(queue, connection, "REGULAR")
    buy(queue, connection, "REGULAR")
    connection.rollback()
    first = buy(queue, connection, "REGULAR")
    assert buy(queue, connection, "REGULAR").id == first.id
    connection.commit()
    assert queue.record("SHOP", "REGULAR").id == first.id
    assert buy(queue, connection, "REGULAR").id == first.id
    connection.rollback()
    queue.flush(10)
    assert billed() == customers() == {"REGULAR"}
    assert queue.stats().delivered == 1


def test_a_window_of_a_savepoint_swallows_nothing(embed, connect, buy, billed):
    """The same within one transaction, part of which is rolled back."""
    queue = embed(coalesce=timedelta(days=1))
    connection = connect()
    connection.execute("BEGIN")
    connection.execute("SAVEPOINT attempt")
    buy(queue, connection, "REGULAR")
    connection.execute("ROLLBACK TO attempt")
    buy(queue, connection, "REGULAR")
    connection.commit()
    queue.flush(10)
    assert billed() == {"REGULAR"}


def test_one_with_a_corrected_type_stands_for_none_of_the_old_one(per, app, embed, connect, buy):
    """What was requeued as of another type swallows none of the type that it had."""
    per.set_fault(Refuse("unknown_type"), times=1)
    queue = embed(coalesce=timedelta(days=1))
    connection = connect()
    first = buy(queue, connection, "REGULAR")
    connection.commit()
    with pytest.raises(ActivityRejected):
        queue.flush(10)
    with closing(OperatorOutbox(app, None)) as operator:
        assert operator.requeue(None, "RIGHT") == 1
    assert buy(queue, connection, "REGULAR").id != first.id
    connection.commit()
    queue.flush(10)
    kinds = [activity.activity_type_id for activity in per.activities]
    assert (len(kinds), kinds.count("RIGHT")) == (2, 1)


@pytest.mark.parametrize("manner", AUTOCOMMIT, ids=str)
def test_without_a_transaction_an_activity_and_its_window_are_one(embed, connect, manner):
    """In autocommit mode, too: an error means that nothing is there, and so is recorded but once."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    connection = connect(**manner)
    connection.execute(
        "CREATE TRIGGER failure BEFORE INSERT ON perqueue_coalesced"
        " BEGIN SELECT RAISE(ABORT, 'no window'); END"
    )
    with pytest.raises(OutboxError, match=r"^not recorded.*no window"):
        queue.record("SHOP", "REGULAR", connection=connection)
    assert not connection.in_transaction
    assert queue.stats().pending == 0
    connection.execute("DROP TRIGGER failure")
    first = queue.record("SHOP", "REGULAR", connection=connection)
    assert queue.record("SHOP", "REGULAR", connection=connection).id == first.id
    assert queue.stats().pending == 1


def test_one_that_per_refused_stands_for_no_other(embed, connect, buy, per, billed):
    """After a refusal the next one in the window is recorded, joined or not."""
    queue = embed(coalesce=timedelta(days=1))
    connection = connect()
    per.set_fault(Refuse("unknown_user"), times=1)
    first = buy(queue, connection, "REGULAR")
    connection.commit()
    with pytest.raises(PerQueueError, match="refused 1"):
        queue.flush(10)
    assert buy(queue, connection, "REGULAR").id > first.id
    connection.commit()
    queue.flush(10)
    assert billed() == {"REGULAR"}


@pytest.mark.usefixtures("patient")
def test_threads_coalesce_beside_each_other(embed):
    """What one thread asks of the file never comes between the statements of another's transaction."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    errors = []

    def record(thread):
        for n in range(40):
            try:
                queue.record("SHOP", f"CUSTOMER_{thread}_{n}")
            except OutboxError as error:
                errors.append(error)

    threads = [threading.Thread(target=record, args=[n]) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert queue.stats().pending == 120


# -- what cannot be joined


def test_another_file_is_refused(queue, connect, tmp_path, app):
    """A connection to anything but the outbox's own file, by its own name, is refused before it writes."""
    other = connect(tmp_path / "other.db")
    with pytest.raises(ConfigurationError, match=r"other\.db"):
        queue.record("SHOP", "CUSTOMER", connection=other)
    with pytest.raises(ConfigurationError, match="no file"):
        queue.record("SHOP", "CUSTOMER", connection=connect(":memory:"))
    # In WAL mode a transaction over two files is not atomic: a kill may commit one of them alone.
    other.execute("ATTACH ? AS app", (str(app),))
    with pytest.raises(ConfigurationError, match=r"other\.db"):
        queue.record("SHOP", "CUSTOMER", connection=other)
    os.link(app, tmp_path / "link.db")  # which would have a journal of its own
    with pytest.raises(ConfigurationError, match=r"link\.db"):
        queue.record("SHOP", "CUSTOMER", connection=connect(tmp_path / "link.db"))
    assert queue.stats().pending == 0


def test_another_name_of_the_same_directory_will_do(queue, connect, tmp_path, app, billed, buy):
    """The file is the same one through a symbolic link to its directory, and from a relative path."""
    (tmp_path / "current").symlink_to(app.parent)
    connection = connect(tmp_path / "current" / app.name)
    buy(queue, connection, "CUSTOMER")
    connection.commit()
    queue.flush(10)
    assert billed() == {"CUSTOMER"}


def test_a_copy_with_the_same_tables_is_refused(queue, connect, tmp_path, app):
    """A backup has the outbox in it, too, and is not the outbox."""
    copy = connect(tmp_path / "copy.db")
    connect().backup(copy)
    with pytest.raises(ConfigurationError, match=r"copy\.db"):
        queue.record("SHOP", "CUSTOMER", connection=copy)


def test_a_temporary_table_of_the_same_name_takes_nothing(queue, connect, billed):
    """The tables are those of the file, whatever the connection has beside them."""
    connection = connect()
    connection.execute("CREATE TEMP TABLE perqueue_activity AS SELECT * FROM perqueue_activity")
    queue.record("SHOP", "CUSTOMER", connection=connection)
    connection.commit()
    queue.flush(10)
    assert billed() == {"CUSTOMER"}


@pytest.mark.parametrize("bad", ["app.db", 7, object()], ids=lambda bad: type(bad).__name__)
def test_what_is_no_connection_is_refused(queue, bad):
    """Anything else is refused by its type, with those that will do."""
    with pytest.raises(ConfigurationError, match=f"a builtins.{type(bad).__name__}, is none of"):
        queue.record("SHOP", "CUSTOMER", connection=bad)


def test_connections_that_cannot_be_used_are_told(queue, connect):
    """Closed, or another thread's: a ConfigurationError, and nothing of sqlite3's comes out."""
    closed = connect()
    closed.close()
    with pytest.raises(ConfigurationError, match="closed database") as caught:
        queue.record("SHOP", "CUSTOMER", connection=closed)
    assert isinstance(caught.value.__cause__, sqlite3.ProgrammingError)
    there = connect()
    errors = []

    def elsewhere():
        try:
            queue.record("SHOP", "CUSTOMER", connection=there)
        except Exception as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    (error,) = errors
    assert isinstance(error, ConfigurationError)
    assert "same thread" in str(error)


def test_a_failure_is_raised_whatever_on_record_error_says(embed, connect, app):
    """Whoever commits the order must know that the activity is not in it: this error has no other way."""
    called = []
    queue = embed(drain=False, on_record_error=called.append)
    holder, connection = connect(), connect(timeout=0)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutboxError, match="rolled back: database is locked") as caught:
        queue.record("SHOP", "CUSTOMER", connection=connection)
    assert caught.value.activity.user_id == "CUSTOMER"
    assert "CUSTOMER" not in str(caught.value)
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert called == []
    read_only = connect(f"{app.as_uri()}?mode=ro", uri=True)
    holder.rollback()
    with pytest.raises(OutboxError, match="readonly"):
        queue.record("SHOP", "CUSTOMER", connection=read_only)


def test_ids_and_the_queue_are_checked_before_the_connection(queue, connect):
    """Bad IDs and a closed queue are told as ever, and the transaction is not touched."""
    connection = connect()
    with pytest.raises(InvalidActivity):
        queue.record("SHOP", "", connection=connection)
    with pytest.raises(InvalidActivity):
        queue.record("SHOP", "CUSTOMER", activity_type_id=7, connection=connection)
    queue.close()
    with pytest.raises(QueueClosed):
        queue.record("SHOP", "CUSTOMER", connection=connection)
    assert not connection.in_transaction


def test_an_outbox_of_its_own_joins_nothing(options, tmp_path, connect):
    """In a file of perqueue's own there is no business: the error names the option."""
    with (
        PerQueue(tmp_path / "own.db", **options) as own,
        pytest.raises(ConfigurationError, match="embedded=True"),
    ):
        own.record("SHOP", "CUSTOMER", connection=connect(tmp_path / "own.db"))


# -- recording beside an open transaction


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
def test_recording_beside_ones_own_transaction_is_an_error_not_a_hang(queue, connect, buy):
    """Without connection= a thread waits for its own transaction in vain, for a second, and is told why."""
    connection = connect()
    buy(queue, connection, "CUSTOMER")
    with pytest.raises(OutboxError, match="connection=") as caught:
        queue.record("SHOP", "CUSTOMER")
    assert caught.value.activity is not None
    connection.commit()
    assert queue.record("SHOP", "CUSTOMER").wait(10)


def test_another_thread_waits_for_the_transaction(queue, connect, buy, billed):
    """Without connection= another thread records as soon as the transaction ends."""
    connection = connect()
    buy(queue, connection, "FIRST")
    begun, ids = threading.Event(), []

    def elsewhere():
        begun.set()
        ids.append(queue.record("SHOP", "SECOND").id)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert begun.wait(5)
    connection.commit()
    thread.join(5)
    queue.flush(10)
    assert ids == [2]
    assert billed() == {"FIRST", "SECOND"}


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
def test_a_long_transaction_holds_up_delivery_and_no_more(queue, connect, per, until, caplog):
    """While the application keeps the file to itself outcomes are held, then stored; none is sent again."""
    application = connect(isolation_level=None)
    receipt = queue.record("SHOP", "FIRST")
    assert receipt.wait(10)
    per.set_fault(Hang(accept=True), times=1)
    queue.record("SHOP", "SECOND")
    until(lambda: len(per.activities) == 2)
    application.execute("BEGIN EXCLUSIVE")
    per.release()
    until(lambda: any("delivery waits" in each.message for each in caplog.records))
    application.execute("COMMIT")
    assert queue.record("SHOP", "THIRD").wait(10)
    queue.flush(10)
    assert [activity.user_id for activity in per.activities] == ["FIRST", "SECOND", "THIRD"]
    assert len([each for each in caplog.records if each.levelname == "ERROR"]) == 1


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_who_reads_does_not_wait_for_the_applications_transaction(embed, connect):
    """While the drain waits with an outcome, stats() and a repeat within its window take no lock of its."""
    queue = embed(coalesce=timedelta(days=1), drain=False)
    queue.record("SHOP", "REGULAR")
    connect().execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor() as pool:
        drain = pool.submit(queue._outbox.request_probe)
        looks = 0
        while not drain.done():
            queue.stats()
            queue.record("SHOP", "REGULAR")
            looks += 1
        assert isinstance(drain.exception(), OutboxError)
    assert looks > 10  # and not one or two, of a second each


OPERATIONS = {
    "record": lambda outbox: outbox.append("SHOP", "CUSTOMER", "TYPE", 1),
    "record once": lambda outbox: outbox.append_once(("SHOP", "CUSTOMER", "TYPE"), (0, 10), 1),
    "claim": lambda outbox: outbox.claim(1, 5),
    "claim what is due": lambda outbox: outbox.claim_due(0, 10, 5, ()),
    "next due": lambda outbox: outbox.next_due(),
    "write": lambda outbox: outbox.request_probe(),
    "position": lambda outbox: outbox.position(),
    "count": lambda outbox: outbox.count_pending(1, 5),
    "outcomes": lambda outbox: outbox.settled([1]),
    "refusals": lambda outbox: (outbox.refusals(), outbox.rejected_since(0, 5), outbox.last_reason(1)),
    "look around": lambda outbox: outbox.change_counter(),
    "keep house": lambda outbox: (outbox.prune(0, 5, 5), outbox.expire(0, 5)),
}


@pytest.mark.parametrize("mode", ["delete"], indirect=True)
@pytest.mark.parametrize("lock", ["a reader's", "a writer's"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_without_a_log_everything_waits_for_the_applications_moments(embed, connect, operation, lock):
    """Readers and writers exclude each other there: nothing fails for a transaction of a few milliseconds."""
    queue = embed(drain=False)
    queue.record("SHOP", "CUSTOMER")
    queue._outbox.change_counter()
    application = connect(isolation_level=None, check_same_thread=False)
    if lock == "a reader's":
        application.execute("BEGIN")
        application.execute("SELECT * FROM orders").fetchall()
    else:
        application.execute("BEGIN EXCLUSIVE")
    ends = threading.Timer(0.05, application.execute, ["ROLLBACK"])
    ends.start()
    try:
        OPERATIONS[operation](queue._outbox)
    finally:
        ends.join()
