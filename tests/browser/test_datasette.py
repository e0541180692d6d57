"""The real Datasette, with the configuration that `perqueue datasette` prints, beside a live outbox."""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode

import pytest
import yaml

from perqueue import ActivityRejected, RetryPolicy
from perqueue._activity import Event, Settlement
from perqueue._outbox import OperatorOutbox
from perqueue.sandbox import Disconnect, Refuse, Status
from tests.helpers import Child
from tests.pages import ROOT

pytest.importorskip("datasette")
CONFIGURATION = yaml.safe_load((ROOT / "examples/datasette/metadata.yaml").read_text())
QUERIES = CONFIGURATION["databases"]["activities"]["queries"]
CHARTS = CONFIGURATION["plugins"]["datasette-dashboards"]["outbox"]["charts"]
HTML = "<img src=x onerror='throw 1'>"
GIVEN = {"billing_id": "GROUP_A", "user_id": "USER_3", "hours": "", "id": "1", "going_back_from_id": ""}
LATEST_MONTH = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)


@pytest.fixture
def datasette(outbox):
    """Starts Datasette as the page tells, on a free port: returns its address. Ended after the test."""
    scripts = Path(sysconfig.get_path("scripts"))
    # -m perqueue: the interpreter of the tests, whatever stands on the path.
    line = f"{sys.executable} -m perqueue datasette | {scripts}/datasette -m - -p 0 {outbox}"
    running = []

    def start():
        environ = {**os.environ, "PERQUEUE_OUTBOX": str(outbox)}
        running.append(
            subprocess.Popen(
                ["bash", "-c", line],
                env=environ,
                start_new_session=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        for said in running[-1].stdout:
            if address := re.search(r"running on (http://127\.0\.0\.1:\d+)", said):
                return address[1]
        raise AssertionError("Datasette has not started")

    yield start
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()


@pytest.fixture
def lived(outbox, per, make_queue):
    """A queue that has seen deliveries, a late one, refusals, a retry, and an outage that goes on."""
    end = round(LATEST_MONTH.timestamp() * 1000)
    with closing(OperatorOutbox(outbox, per.url)) as past:
        activity_id = past.append("GROUP_A", "USER_LATE", "LOGIN", end - 3_600_000)
        [activity] = past.claim(activity_id - 1, 1)
        settlement = Settlement(
            activity=activity,
            event=Event.ACCEPT,
            answered_at=end + 60_000,
            duration_ms=4321,
            transaction_id="T1",
        )
        past.settle([settlement], drained_through=activity_id, refusals=(0, None))
    queue = make_queue(max_in_flight=4, retry=RetryPolicy(base=0.01, cap=0.05))
    for number in range(2, 32):
        queue.record(f"GROUP_{'ABC'[number % 3]}", f"USER_{number}", activity_type_id="LOGIN")
    queue.record("GROUP_B", HTML, activity_type_id="EXPORT")
    queue.flush()
    per.set_fault(Status(500), times=1)
    queue.record("GROUP_A", "USER_TWICE").wait(10)
    per.set_fault(Refuse("this activity type is unknown"))
    for number in range(3):
        queue.record("GROUP_C", f"USER_REFUSED_{number}")
        with suppress(ActivityRejected):
            queue.flush()
    per.set_fault(Disconnect())
    for number in range(4):
        queue.record("GROUP_B", f"USER_PENDING_{number}")
    return queue


def _table(page):
    """Return the rows of a query's page, each as one text."""
    return [" | ".join(row.locator("td").all_inner_texts()) for row in page.locator("tbody tr").all()]


def _shoot(page, name):
    """Keep a picture to look at, in the folder that PERQUEUE_SHOTS names."""
    if folder := os.environ.get("PERQUEUE_SHOTS"):
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)


SHOWS = {
    "now": r"4 \| .* \| 33 \| 3 \| 0 \| 0 \| .*Per or the network is away",
    "per_billing_id": r"GROUP_C \| sandbox-activity-type \| 0 \| 3 \| 0 \| 0 \| 3 \|",
    "user": r"\d+ \| .* \| LOGIN \| accepted \|",
    "activity": r"accepted by Per \| 4321 \| transaction T1",
    "late": rf"{LATEST_MONTH - timedelta(1):%Y-%m} \| {LATEST_MONTH:%Y-%m} \| GROUP_A \| LOGIN \| 1 \| 1 \|",
    "rejected_by_reason": r"this activity type is unknown \| 3 \| 3 \|",
    "rejected": r"GROUP_C \| USER_REFUSED_2 \| .* \| this activity type is unknown",
    "pending": r"GROUP_B \| USER_PENDING_0 \|",
    "backlog": r"Z \| 4$",
    "deliveries": r"Z \| [1-9.]+ \| 0\.\d+ \|",
    "answers": r"Z \| \d+ \| \d+ \| \d+ \| 3\d$",
    "slowest": r"4321 \| .* \| accepted \| .* \| GROUP_A \| USER_LATE \| 1",
}


def test_every_query_shows_its_rows(browse, lived, datasette, until):
    """Each query, opened from the page of the file as a reader would, shows what happened."""
    until(lambda: lived.stats().state == "backing_off")
    address = datasette()
    assert SHOWS.keys() == QUERIES.keys()
    with browse() as page:
        page.goto(f"{address}/activities")
        links = {link.inner_text(): link.get_attribute("href") for link in page.get_by_role("link").all()}
        for name, query in QUERIES.items():
            given = {parameter: GIVEN[parameter] for parameter in query.get("params", [])}
            page.goto(f"{address}{links[query['title']]}?{urlencode(given)}")
            _shoot(page, name)
            if name == "user":
                assert [row.split(" | ")[0] for row in _table(page)] == ["3"]
            assert any(re.search(SHOWS[name], row) for row in _table(page)), (name, _table(page))


def test_charts_are_drawn(browse, lived, datasette, until):
    """The page of charts draws all of them, asks nobody but this machine, and takes no ID for HTML."""
    until(lambda: lived.stats().state == "backing_off")
    address = datasette()
    with browse() as page:
        page.goto(address)
        page.get_by_role("link", name="the charts").click()
        numbers = {"pending": "4", "accepted": "33", "rejected": "3"}
        for name, chart in CHARTS.items():
            drawn = page.locator(f"#chart-{name}")
            if chart["library"] == "metric":
                drawn.locator("p").wait_for()
                assert drawn.inner_text() == numbers.get(name, drawn.inner_text())
            else:
                drawn.locator("svg [role=graphics-symbol][aria-roledescription]").first.wait_for()
        assert page.locator("#chart-customers").get_by_text("GROUP_A").count() == 1
        assert page.locator("#chart-reasons").get_by_text("this activity type is unknown").count() == 1
        _shoot(page, "charts")
        page.goto(f"{address}/activities/perqueue_activity_log?billing_id=GROUP_B")
        assert HTML in page.locator("table.rows-and-columns").inner_text()


@pytest.mark.parametrize("name", QUERIES)
def test_no_query_reads_a_whole_table(make_queue, outbox, name):
    """However much is in the outbox, a query goes by keys: Datasette ends it after a second."""
    make_queue(drain=False)
    with closing(sqlite3.connect(f"{outbox.as_uri()}?mode=ro", uri=True)) as connection:
        sql = QUERIES[name]["sql"]
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", GIVEN)]
        assert connection.execute(sql, GIVEN).fetchall() is not None  # an empty outbox is no error
    steps = [step for step in plan if re.search(r"\b(a|s|perqueue_(activity|settlement|attempt))\b", step)]
    assert steps
    # By an index of a few rows, or in the order of the keys up to a LIMIT.
    assert [
        step for step in steps if step.startswith("SCAN") and "perqueue_settlement_rejection" not in step
    ] == []


OPEN = """
import sqlite3
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("UPDATE perqueue_outbox SET created_at = '2018'")  # stays in the log
print("open", flush=True)
sys.stdin.read()
"""


def _beside(outbox):
    return {
        path.name: (path.read_bytes(), oct(path.stat().st_mode))
        for path in sorted(outbox.parent.iterdir())
        if not path.name.endswith("-shm")  # where readers mark how far they read
    }


def _visit(address):
    for path in ("", "activities", "activities/perqueue_activity", "activities/perqueue_activity_log"):
        urllib.request.urlopen(f"{address}/{path}").close()
    for name in QUERIES:
        urllib.request.urlopen(f"{address}/activities/{name}.json?id=1&billing_id=GROUP_A&user_id=U").close()


def test_recording_and_delivery_go_on_beside_it(lived, per, datasette, outbox, until):
    """While pages are open, record() and the drain go on, and the write-ahead log is emptied."""
    address = datasette()
    _visit(address)
    per.clear_faults()
    for number in range(3000):
        lived.record("GROUP_D", f"USER_{number}")
        if number % 1000 == 0:
            _visit(address)
    lived.flush()
    with closing(sqlite3.connect(f"{outbox.as_uri()}?mode=rw", uri=True)) as connection:
        until(lambda: connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0)
    assert outbox.with_name(f"{outbox.name}-wal").stat().st_size < 100_000
    with urllib.request.urlopen(f"{address}/activities/now.json?_shape=array") as answer:
        assert b'"pending": 0' in answer.read()


@pytest.mark.parametrize("state", ["open", "closed"])
def test_it_changes_nothing(make_queue, datasette, outbox, state):
    """Datasette writes nothing into an outbox, whether or not a program has it open; the mode stays 0600."""
    with make_queue(drain=False) as queue:
        for number in range(100):
            queue.record("GROUP_A", f"USER_{number}")
    with ExitStack() as opened:
        if state == "open":
            opened.enter_context(Child(OPEN, outbox)).expect("open")
        before = _beside(outbox)
        assert bool(before.get(f"{outbox.name}-wal", (b"",))[0]) == (state == "open")
        address = datasette()
        _visit(address)
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(f"{address}/activities.json?sql=delete+from+perqueue_activity")
        after = _beside(outbox)
    assert {name: found for name, found in after.items() if name in before} == before
    # SQLite leaves an empty log where there was none.
    assert [found for name, found in after.items() if name not in before] in ([], [(b"", "0o100600")])


def test_the_database_has_the_name_of_the_file(tmp_path, make_queue):
    """What is printed names the file as Datasette does, and nothing in it."""
    path = tmp_path / "billing-2.db"
    make_queue(path, drain=False).record("GROUP_SECRET", "USER_1")
    program = [sys.executable, "-m", "perqueue", "datasette", "-o", path]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    printed = yaml.safe_load(said)
    assert list(printed["databases"]) == ["billing-2"]
    charts = printed["plugins"]["datasette-dashboards"]["outbox"]["charts"]
    assert {chart["db"] for chart in charts.values()} == {"billing-2"}
    assert "GROUP_SECRET" not in said
