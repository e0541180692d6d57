"""Setting up the tables, and who may open what is there."""

import threading
from contextlib import closing
from datetime import timedelta

import pytest

from perqueue import ActivityRejected, ConfigurationError, OutboxError, OutboxMismatch, PerQueue
from perqueue._address import DatabaseURL
from perqueue.sandbox import Refuse
from tests.postgres.conftest import recorded

SECRET = "s3cret"
TABLES = (
    "perqueue_pending, perqueue_settled, perqueue_attempt, perqueue_drainer, perqueue_outbox,"
    " perqueue_coalesced"
)


def test_ten_starts_at_once_make_one_outbox(make_queue, sql):
    """However many programs start at once, the tables are made once, and all of them record."""
    failures = []

    def start():
        try:
            make_queue(drain=False).record("GROUP", "USER")
        except Exception as error:  # noqa: BLE001 - whatever it is
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failures == []
    assert sql("SELECT count(*) FROM perqueue_pending") == [(10,)]
    assert sql("SELECT count(*) FROM perqueue_outbox") == [(1,)]


def test_another_origins_outbox_is_refused(make_queue):
    """A sandbox never swallows what is recorded for another Per."""
    make_queue(drain=False)
    with pytest.raises(OutboxMismatch, match="belongs to http://127"):
        make_queue(drain=False, base_url="https://other.example")


def test_an_outbox_of_a_newer_version_is_refused(make_queue, sql):
    """An older perqueue leaves a newer one's tables alone, and says what to do."""
    make_queue(drain=False).close()
    sql("UPDATE perqueue_outbox SET schema_version = 99")
    with pytest.raises(OutboxMismatch, match=r"newer perqueue .* upgrade"):
        make_queue(drain=False)


def test_two_schemas_are_two_outboxes(make_queue, outbox, database):
    """Each schema of a database has an outbox of its own."""
    other = f"{outbox}_other"
    database.sql(f"CREATE SCHEMA {other.rpartition('%3D')[2]}")
    first, second = make_queue(drain=False), make_queue(other, drain=False)
    first.record("GROUP", "USER")
    assert (first.stats().pending, second.stats().pending) == (1, 0)


def test_a_database_of_another_encoding_is_refused(database, options):
    """What cannot hold every ID is refused before anything is recorded."""
    database.sql("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    with pytest.raises(OutboxMismatch, match="encoding is LATIN1"):
        PerQueue(database.url.replace("/postgres", "/latin"), **options)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://perqueue:wrong@127.0.0.1:{port}/postgres", "password"),
        ("postgresql://perqueue:s3cret@127.0.0.1:{port}/missing", "createdb"),
        ("postgresql://perqueue:s3cret@127.0.0.1:1/postgres", "refused"),
        ("postgresql://perqueue:s3cret@127.0.0.1:99999/postgres", "(look at the outbox's URL"),
        (
            "postgresql://perqueue:s3cret@127.0.0.1:{port}/postgres?sslmode=require",
            "(look at the outbox's URL",
        ),
        ("postgresql://perqueue:s3cret@127.0.0.1:{port}/postgres?service=none", "(look at the outbox's URL"),
        (
            "postgresql://perqueue:s3cret@127.0.0.1:{port}/postgres?options=-csearch_path%3Dno",
            "create the schema",
        ),
        ("postgresql://perqueue:s3cret@no-such-host.invalid/postgres", "no-such-host"),
    ],
)
def test_what_cannot_be_reached_is_told_with_a_remedy(database, options, url, says):
    """An outbox that cannot be opened is one OutboxError that says why, without the password."""
    with pytest.raises(OutboxError) as caught:
        PerQueue(url.format(port=database.port), **options)
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:GEHEIM@[::1/db",
        "postgresql://user:GEHEIM@host/db?no_such_option=1",
        "postgresql://user:GEHEIM@host/db%zz",
    ],
)
def test_what_libpq_cannot_read_is_a_mistake_in_the_configuration(options, url):
    """A URL that will never work is told at once as what it is, without the password."""
    with pytest.raises(ConfigurationError, match="look at the outbox's URL") as caught:
        PerQueue(url, **options)
    assert "GEHEIM" not in str(caught.value)


def test_variables_of_libpq_are_obeyed(outbox, monkeypatch):
    """What the environment tells libpq holds, unless the URL says otherwise."""
    from perqueue._outbox.postgres.connection import connect

    monkeypatch.setenv("PGAPPNAME", "billing")
    with closing(connect(DatabaseURL(outbox))) as connection:
        assert connection.execute("SHOW application_name").fetchone() == ("billing",)


def test_several_hosts_in_a_variable_lead_to_the_one_that_takes_writes(database, monkeypatch):
    """With several hosts in PGHOST, as in the URL, a server that only reads is passed over."""
    from perqueue._outbox.postgres.connection import connect

    monkeypatch.setenv("PGHOST", "127.0.0.1,127.0.0.1")
    monkeypatch.setenv("PGPORT", str(database.port))
    url = DatabaseURL(f"postgresql://perqueue:{SECRET}@/postgres")
    with closing(connect(url)) as connection:
        assert connection.info.get_parameters()["target_session_attrs"] == "read-write"
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "any")
    with closing(connect(url)) as connection:
        assert "target_session_attrs" not in connection.info.get_parameters()  # nothing but the variable


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:GEHEIM@host/db",
        "postgres://user:GEHEIM@one,two:5433/db?sslmode=require",
        "postgresql://host/db?user=me&password=GEHEIM",
        "postgresql://user:GEHEI%4D@host/db?sslpassword=GEHEIM",
    ],
)
def test_a_password_shows_nowhere(url):
    """The text of an address has no password, wherever that stood, and takes it out of other texts."""
    address = DatabaseURL(url)
    for shown in (str(address), repr(address), address.redact("failed: GEHEIM is wrong")):
        assert "GEHEI" not in shown


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:GEH@IM@host/db",
        "postgresql://user:GEH/IM@host/db",
        "postgresql://user:12/GEH@host/db",
        "postgresql://user:GEH?IM@host/db",
        "postgresql://user@host/db?pass%77ord=GEHEIM",
    ],
)
def test_a_password_that_would_be_read_as_something_else_is_refused(url):
    """A raw @, / or ? in a password would end up in the host's name or the database's, and show there."""
    with pytest.raises(ConfigurationError, match="%40") as caught:
        DatabaseURL(url)
    assert "GEH" not in str(caught.value)


def test_a_hash_in_a_password_shows_nothing_of_it():
    """A # is taken as libpq takes it: as it is."""
    assert str(DatabaseURL("postgresql://user:GEH#EIM@host/db")) == "postgresql://user:***@host/db"


@pytest.mark.parametrize(
    "outbox",
    [
        "host=db.example dbname=billing user=app password=GEHEIM",
        "postgresql:/app:GEHEIM@db.example/billing",
        "postgresql+psycopg://app:GEHEIM@db.example/billing",
    ],
)
def test_another_way_to_name_a_database_is_no_file(tmp_path, monkeypatch, outbox):
    """Keywords of libpq and other libraries' URLs are refused: no file's name shows a password."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="postgresql:// URL") as caught:
        PerQueue(outbox, drain=False)
    assert "GEHEIM" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "damage",
    ["TRUNCATE perqueue_outbox", "DROP TABLE perqueue_outbox", "DROP TABLE perqueue_pending CASCADE"],
)
def test_a_missing_table_or_row_is_told_with_a_remedy(make_queue, sql, damage):
    """Whoever asks what an outbox holds that somebody dropped or emptied is told that, and what to do."""
    queue = make_queue(drain=False)
    queue.record("GROUP", "USER")
    sql(damage)
    with pytest.raises(OutboxError, match=r"(emptied|dropped)\? Restart the program"):
        queue.stats()


@pytest.mark.parametrize(
    "damage",
    [
        f"TRUNCATE {TABLES}",
        f"TRUNCATE {TABLES} RESTART IDENTITY",
        "TRUNCATE perqueue_outbox",
        "TRUNCATE perqueue_outbox, perqueue_drainer, perqueue_settled",
        f"DROP TABLE {TABLES} CASCADE",
        *(f"DROP TABLE {table} CASCADE" for table in TABLES.split(", ")),
    ],
)
def test_a_restart_mends_what_somebody_dropped_or_emptied(make_queue, per, sql, until, damage):
    """What is left is delivered and counted, no number comes again, and new activities go as ever."""
    per.set_fault(Refuse("unknown"), when=lambda activity: activity.user_id == "REFUSED")
    queue = make_queue()
    queue.record("GROUP", "DELIVERED").wait(10)
    with pytest.raises(ActivityRejected):
        queue.record("GROUP", "REFUSED").wait(10)
    per.go_down()
    old = queue.record("GROUP", "PENDING")
    until(lambda: queue.stats().state == "backing_off")
    sql(damage)
    kept = {"MEANWHILE"} if recorded(queue, "MEANWHILE") else set()
    queue.close()
    per.come_back()
    queue = make_queue()
    if "RESTART" not in damage and f"DROP TABLE {TABLES}" not in damage:
        assert queue.record("GROUP", "NEW").id > old.id
    queue.flush(20)
    with pytest.raises(ActivityRejected):
        queue.record("GROUP", "REFUSED").wait(10)
    kept |= set() if "perqueue_pending" in damage else {"PENDING"}
    assert kept <= {activity.user_id for activity in per.activities}
    ((delivered, rejected),) = sql(
        "SELECT count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2) FROM perqueue_settled"
    )
    stats = queue.stats()
    assert (stats.pending, stats.rejected) == (0, rejected)
    ((pruned,),) = sql("SELECT pruned FROM perqueue_outbox")
    assert stats.delivered - pruned == delivered
    assert sql("SELECT count(*) FROM perqueue_activity_log") == [(delivered + rejected,)]


def test_no_window_is_taken_by_an_activity_that_is_gone(make_queue, per, sql):
    """Who had been recorded, and lost with a dropped table, is recorded again and not taken for a repeat."""
    daily = timedelta(days=1)
    make_queue(coalesce=daily, drain=False).record("GROUP", "USER")
    sql("DROP TABLE perqueue_pending CASCADE")
    queue = make_queue(coalesce=daily)
    queue.record("GROUP", "USER").wait(10)
    assert [activity.user_id for activity in per.activities] == ["USER"]
