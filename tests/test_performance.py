"""The pages say what was measured: their tables and plots are those of benchmarks/results.json."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
TEXT = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
TABLES = re.compile(r"<!-- results: .*?<!-- end -->", re.DOTALL)


@pytest.fixture
def report(monkeypatch):
    """Returns the module that writes the tables. Benchmarks are scripts: they import each other by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "_frame", raising=False)
    spec = importlib.util.spec_from_file_location("_report", BENCHMARKS / "_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_shows_the_results(report):
    """Every table of measurements is made of the committed results, figure for figure."""
    assert len(TABLES.findall(TEXT)) > 8
    assert len(report.DOCUMENTS) == 2
    for document in report.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert report.documented(text, report.load()) == text, document.name


def test_an_edited_figure_is_noticed(report):
    """The check above would see a figure that nobody has measured."""
    edited = re.sub(r"(\| \*\*perqueue\*\* \| )[\d.,]+", r"\g<1>99,999", TEXT)
    assert edited != TEXT
    assert report.documented(edited, report.load()) != edited


def test_running_text_claims_no_measurement():
    """Beside the tables no microseconds are quoted: they would be of some other run."""
    assert re.findall(r"\d\s?µs", TABLES.sub("", TEXT)) == []


def test_every_plot_is_there_and_shown():
    """Every plot that the text shows exists, and every plot that exists is shown."""
    shown = set(re.findall(r"\]\(plots/([\w-]+\.svg)\)", TEXT))
    assert shown == {path.name for path in (ROOT / "docs" / "plots").iterdir()}


def test_every_benchmark_has_results(report):
    """Each script that `make bench` runs has its figures in the results."""
    scripts = {path.stem for path in BENCHMARKS.glob("[a-z]*.py")} - {"run"}
    assert set(report.load()) == scripts


def test_a_benchmark_that_raises_fails_the_run(tmp_path):
    """`make bench-smoke` does not pass over a benchmark that no longer works."""
    for name in ("run.py", "_report.py", "_frame.py"):
        (tmp_path / name).write_bytes((BENCHMARKS / name).read_bytes())
    (tmp_path / "broken.py").write_text("raise SystemExit('it broke')")
    run = [sys.executable, str(tmp_path / "run.py"), "--smoke"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "it broke" in done.stderr
