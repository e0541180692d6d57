"""`docs/observability.md` says what there is, and nothing else."""

import inspect
import json
import re
from pathlib import Path

import pytest
import yaml
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from perqueue import PerQueue
from perqueue._instruments import OF_THE_OUTBOX, OF_THE_PROCESS, RECORD_DURATION, REQUEST_DURATION
from perqueue._measures import Error, Kind
from perqueue.sandbox import Status

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "observability.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")


def rows(heading, level="##"):
    """Return the table rows under a heading, as lists of cells."""
    part = TEXT.split(f"\n{level} {heading}\n")[1].split(f"\n{level} ")[0]
    lines = re.findall(r"^\| (.*) \|$", part, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def words(cell):
    return re.findall(r"`([^`]+)`", cell)


def blocks():
    document = Document(TEXT, str(DOCUMENT))
    for region in PythonCodeBlockParser()(document):
        document.add(region)
    return list(document)


def test_every_metric_is_in_the_table_with_its_unit_and_kind():
    """Who builds a dashboard from the page finds the names, units and kinds that are exported."""
    kinds = {
        "create_observable_gauge": "gauge",
        "create_observable_counter": "counter",
        "create_observable_up_down_counter": "updowncounter",
    }
    real = {spec.name: (spec.unit, kinds[spec.make]) for spec in (*OF_THE_OUTBOX, *OF_THE_PROCESS)}
    real |= {spec.name: (spec.unit, "histogram") for spec in (RECORD_DURATION, REQUEST_DURATION)}
    told = {
        words(row[0])[0]: (words(row[1])[0], row[2])
        for row in rows("Metrics")
        if len(row) == 6 and words(row[0])
    }
    assert told == real


def test_every_error_and_outcome_is_explained():
    """The closed sets of attributes are complete on the page."""
    told = {word for row in rows("Metrics") if len(row) == 2 for word in words(row[0])}
    assert {str(error) for error in Error} <= told
    assert all(f"`{kind}`" in TEXT for kind in Kind)


def test_every_line_of_the_log_is_explained():
    """Each line that perqueue logs from INFO up is in the table, as it is written; and no other."""
    sources = [
        path.read_text(encoding="utf-8")
        for path in (ROOT / "perqueue").rglob("*.py")
        if "sandbox" not in path.parts and "cli" not in path.parts
    ]
    joined = re.sub(r'"\s*f?"', "", "\n".join(sources))  # texts that are written over several lines
    lines = [re.search(r"`([^`]+)`", row[0]).group(1) for row in rows("The log") if "`" in row[0]]
    assert len(lines) > 15
    assert [line for line in lines if line not in joined] == []
    calls = r"log\.(?:warning|error|info)\(|_complaints\.tell\((?!about)|self\._complain\((?!error)"
    # A bad token is one call with two texts.
    assert sum(len(re.findall(calls, source)) for source in sources) + 1 == len(lines)


def test_every_alert_is_listed():
    """The table of alerts is that of the rules."""
    rules = yaml.safe_load((ROOT / "examples" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    names = [rule["alert"] for rule in rules["groups"][0]["rules"]]
    assert [words(row[0])[0] for row in rows("Metrics") if row[0].startswith("`Perqueue")] == names


def test_every_callback_is_explained():
    """The table of hooks has every callback that `PerQueue` takes."""
    callbacks = [name for name in inspect.signature(PerQueue).parameters if name.startswith("on_")]
    assert [words(row[0])[0] for row in rows("Hooks") if words(row[0])] == callbacks


def test_links_lead_somewhere():
    """Every file that the page links to is there."""
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (DOCUMENT.parent / link).exists()] == []


@pytest.fixture
def _at_home(options, monkeypatch, tmp_path):
    """An empty directory, and the environment that a reader has exported."""
    monkeypatch.chdir(tmp_path)
    for name, value in options.items():
        monkeypatch.setenv(f"PER_{name.upper()}", value)


@pytest.mark.usefixtures("_at_home")
@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"line {block.line}")
def test_python_on_the_page_runs(per, capsys, block):
    """Every Python block runs by itself, in an environment that is set up."""
    block.document.namespace.clear()
    block.evaluate()
    assert per.accepted == 1
    reader = block.document.namespace.get("reader")
    if isinstance(reader, InMemoryMetricReader):
        assert "perqueue.record.duration" in json.dumps(json.loads(capsys.readouterr().out))
        block.document.namespace["provider"].shutdown()


@pytest.mark.usefixtures("_at_home")
def test_the_hook_on_the_page_says_why(per, make_queue, caplog, until):
    """The example's line names how many wait, for how long, and why."""
    (block,) = [block for block in blocks() if "on_stalled" in block.parsed]
    block.document.namespace.clear()
    block.evaluate()
    per.set_fault(Status(503))
    queue = make_queue(on_stalled=block.document.namespace["stalled"], stalled_after=0.1)
    queue.record("GROUP_A", "USER_1")
    until(lambda: "1 activities wait, the oldest for" in caplog.text)
    assert "HTTP 503" in caplog.text
