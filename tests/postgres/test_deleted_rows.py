"""A transaction that stays open: what was delivered cannot be cleaned up, and must not be gone over."""

from contextlib import closing

import psycopg
import pytest

from perqueue._activity import Event, Settlement
from perqueue._address import DatabaseURL
from tests.helpers import until

ORIGIN = "https://per.example"


@pytest.fixture
def open_outbox(outbox, monkeypatch):
    """Open drainers for which a few deleted rows are many."""
    from perqueue._outbox.postgres import floor
    from perqueue._outbox.postgres.outbox import PostgresOutbox

    monkeypatch.setattr(floor, "_MANY", 100)
    monkeypatch.setattr(floor, "_STEP", 1)
    opened = []

    def begin():
        opened.append(PostgresOutbox(DatabaseURL(outbox), ORIGIN))
        opened[-1].begin_term()
        return opened[-1]

    yield begin
    for each in opened:
        each.close()


@pytest.fixture
def idle(database):
    """A transaction that stays open, and keeps its snapshot: a backup, say."""
    with psycopg.connect(database.url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT 1")
        yield connection


def append(outbox, count):
    return [outbox.append("GROUP", f"USER_{number}", "TYPE", 1_000) for number in range(count)]


def sweep(outbox, after=0):
    outbox._sweep_at = float("-inf")
    return outbox.claim(after, 1000)


def settle(outbox, activities, event=Event.ACCEPT, **more):
    settlements = [
        Settlement(activity=each, event=event, answered_at=2_000, transaction_id="T", reason="R", **more)
        for each in activities
    ]
    outbox.settle(settlements, drained_through=0, refusals=(0, None))


def deliver(outbox, sql, count):
    """Let so many pass, and wait until the server has counted what was deleted."""
    recorded = append(outbox, count)
    settle(outbox, sweep(outbox))
    outbox._rows("SELECT pg_stat_force_next_flush()")
    deleted = "SELECT pg_stat_get_dead_tuples('perqueue_pending'::regclass)"
    until(lambda: sql(deleted)[0][0] >= count, "the deleted rows are counted", 20)
    return recorded[-1]


def floor(sql):
    return sql("SELECT pending_after FROM perqueue_outbox")[0][0]


def raised(drainer, sql, seen):
    """Look twice: for who may still commit, and whether they have."""
    sweep(drainer, seen)
    sweep(drainer, seen)
    return floor(sql)


@pytest.mark.usefixtures("idle")
def test_what_was_delivered_is_not_gone_over_again(open_outbox, sql):
    """Beside a transaction that stays open, a new drainer looks only behind what has left."""
    drainer = open_outbox()
    seen = deliver(drainer, sql, 300)
    assert raised(drainer, sql, seen) == seen
    (fresh,) = append(drainer, 1)
    heir = open_outbox()
    assert [each.id for each in sweep(heir)] == [fresh]
    assert heir._pending_after == seen
    assert (heir.position().pending, heir.position().oldest_pending[0]) == (1, fresh)
    assert heir.count_pending(fresh, 10) == 1


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.usefixtures("idle")
def test_what_is_committed_last_is_found(open_outbox, sql, outbox, monkeypatch, knows):
    """An activity of a transaction that commits late is found; without the look at who records, it is not."""
    from perqueue._outbox.postgres import floor as module

    if not knows:
        monkeypatch.setattr(module, "_WRITERS", "SELECT 'nobody' WHERE false")
    drainer = open_outbox()
    with psycopg.connect(outbox) as late:
        (number,) = late.execute(
            "INSERT INTO perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
            " VALUES ('GROUP', 'LATE', 'TYPE', 1) RETURNING id"
        ).fetchone()
        seen = deliver(drainer, sql, 300)
        assert raised(drainer, sql, seen) == (0 if knows else seen)
        late.commit()
    assert [each.id for each in sweep(drainer, seen)] == ([number] if knows else [])


@pytest.mark.usefixtures("idle")
def test_what_waits_or_is_claimed_is_counted_and_found(open_outbox, sql):
    """What another drainer has claimed holds the number down; what waits on its own account is still seen."""
    drainer, other = open_outbox(), open_outbox()
    first, second = append(drainer, 2)
    claimed = other.claim(0, 2)
    seen = deliver(drainer, sql, 300)
    assert raised(drainer, sql, seen) == first - 1
    settle(other, claimed, Event.DEFER, not_before=62_000)
    assert raised(drainer, sql, seen) == seen
    position = drainer.position()
    assert (position.pending, position.oldest_pending[0]) == (2, first)
    assert drainer.count_pending(first, 10) == 1
    assert [each.id for each in drainer.claim_waiting(0, 10)] == [first, second]


@pytest.mark.usefixtures("idle")
def test_a_prepared_transaction_counts_as_one_that_may_still_commit(open_outbox, sql, monkeypatch):
    """Whoever is prepared to commit in two steps has another name than before, and is waited for."""
    from perqueue._outbox.postgres import floor as module

    drainer = open_outbox()
    seen = deliver(drainer, sql, 300)
    sweep(drainer, seen)
    monkeypatch.setattr(module, "_WRITERS", "SELECT '-1/4711'")
    sweep(drainer, seen)
    assert floor(sql) == 0


def test_all_is_looked_at_again_when_the_database_has_cleaned_up(open_outbox, database, outbox, sql):
    """Once vacuum has removed what was deleted, each look begins with the very oldest again."""
    with psycopg.connect(database.url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT 1")
        drainer = open_outbox()
        seen = deliver(drainer, sql, 300)
        assert raised(drainer, sql, seen) == seen
    with closing(psycopg.connect(outbox, autocommit=True)) as connection:
        deleted = "SELECT pg_stat_get_dead_tuples('perqueue_pending'::regclass)"

        def cleaned():
            connection.execute("VACUUM perqueue_pending")
            return connection.execute(deleted).fetchone()[0] < 100

        until(cleaned, "the deleted rows are gone", 20)
    sweep(drainer, seen)
    assert floor(sql) == drainer._pending_after == 0


@pytest.mark.usefixtures("idle")
def test_a_look_for_room_does_not_go_over_what_was_delivered(open_outbox, sql):
    """For `max_pending` the pending ones are counted, and not what was deleted and cannot be cleaned up."""
    from perqueue._outbox.postgres.outbox import _ROOM

    def pages():
        plan = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + _ROOM
        ((found,),) = drainer._rows(plan, ("perqueue_pending", 5000))
        return found[0]["Plan"]["Shared Hit Blocks"]

    drainer = open_outbox()
    (first,) = append(drainer, 1)
    settle(drainer, sweep(drainer), Event.DEFER, not_before=62_000)
    recorded = "INSERT INTO perqueue_pending (billing_id, user_id, activity_type_id, recorded_at)"
    sql(recorded + " SELECT 'GROUP', 'USER', 'TYPE', 1 FROM generate_series(1, 30000)")
    sql("ANALYZE perqueue_pending")  # so large that the server prefers the index
    sql("DELETE FROM perqueue_pending WHERE not_before IS NULL")
    seen = deliver(drainer, sql, 300)
    before = pages()
    assert raised(drainer, sql, seen) == seen
    assert pages() < before / 2
    assert drainer._row(_ROOM, ("perqueue_pending", 5000))[0] == 1
    assert drainer.position().oldest_pending[0] == first
