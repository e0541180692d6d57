"""Every page is a promise: its Python runs, its commands work, and its links lead somewhere."""

import os
import re
import signal
import subprocess
import sysconfig
import tomllib
from contextlib import suppress

import pytest

import perqueue
from perqueue import ActivityRejected, PerQueue
from perqueue.sandbox import Refuse
from tests.helpers import Lines
from tests.pages import ROOT, pages, words

PAGES = pages()
ELSEWHERE_TRIED = ("docs/recipes/", "docs/testing", "docs/postgresql")
GENERAL = [page for page in PAGES if not page.name.startswith(ELSEWHERE_TRIED)]
"""Those without tests of their own: recipes are tried with their frameworks, the test kit in projects."""
COMMANDS = [line for page in GENERAL for line in page.commands()]
UNENDING = re.compile(r"--watch|^perqueue sandbox(?!.*--help)")
"""What goes on until it is told to end."""
ANSWERING = re.compile(r"status --check|^perqueue (reconcile|doctor)")
"""What answers by its exit code: 1 is an answer, too."""
ELSEWHERE = re.compile(
    r"(pip install|make|datasette|opentelemetry-instrument|prometheus|promtool|sqlite3) "
    r"|perqueue datasette .*\| *datasette "
)
"""What is tried by a test of its own, or belongs to the reader's machine."""
OWN_TEST = {"perqueue demo"}


def commands():
    """Returns each command of all pages: a job's without its times, and no alarm is raised."""
    lines = [re.sub(r"^(\S+ ){5} *", "", line) if line.startswith("*") else line for line in COMMANDS]
    return list(dict.fromkeys(line.replace("page-somebody", "true") for line in lines))


@pytest.fixture
def equipped(tmp_path, monkeypatch, options):
    """A folder to be in, and what a reader of the pages has in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PERQUEUE_OUTBOX", "activities.db")
    for name, value in options.items():
        monkeypatch.setenv(f"PER_{name.upper()}", value)
    return tmp_path


@pytest.fixture
def lived_in(equipped, per):
    """An outbox of twenty activities, of which Per refused number 17, and a file of others."""
    with PerQueue() as queue:
        for number in range(1, 21):
            per.set_fault(Refuse("unknown activity type") if number == 17 else None)
            queue.record("GROUP_A", f"USER_{number}")
            with suppress(ActivityRejected):
                queue.flush()
    (equipped / "activities.csv").write_text("GROUP_A,USER_21\n")
    return equipped


@pytest.mark.parametrize(
    "block",
    [block for page in GENERAL for block in page.python()],
    ids=lambda block: f"{os.path.relpath(block.path, ROOT)}:{block.line}",
)
@pytest.mark.usefixtures("equipped")
def test_python_runs(block):
    """Every Python block runs by itself, given a queue and an environment that is set up."""
    with PerQueue() as queue:
        block.document.namespace.clear()
        block.document.namespace["queue"] = queue
        block.evaluate()
        block.document.namespace["queue"].close()  # a page's own need not say how it ends


@pytest.mark.parametrize("line", [line for line in commands() if not ELSEWHERE.match(line)])
def test_commands_work(line, lived_in):
    """Every `perqueue …` and `sqlite-utils …` works, on an outbox that has seen something."""
    if line in OWN_TEST:
        return
    line = line.replace("/var/lib/app", str(lived_in)).replace("discard", "discard --yes")  # nobody to ask
    scripts = sysconfig.get_path("scripts")
    with subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; {line}"],
        env=os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        if UNENDING.search(line):
            assert Lines(process.stdout.fileno()).next(20)
            os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode in ((0, 1) if ANSWERING.search(line) else (0,)), said.decode()


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make ")])
def test_make_targets_exist(line):
    """Every `make …` is a target, and described in `make help`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{words(line)[1]}:.*## ", makefile, re.MULTILINE)


def test_extras_exist():
    """Every extra that a page tells to install is one, and the distribution has its right name."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [line for line in commands() if line.startswith("pip install ")]
    assert len(lines) > 2
    for line in lines:
        name, _, wanted = words(line)[2].partition("[")
        assert name in (".", "useper-perqueue"), line
        assert not wanted or wanted.removesuffix("]") in extras, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every file that a page links to is there, and so is the heading."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.text) if "://" not in link]
    for link in links:
        path, _, heading = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), link
        assert not heading or heading in _headings(target), link


def _headings(path):
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_reference_has_every_public_name():
    """What can be imported from `perqueue` stands in the reference."""
    text = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\.\. auto(?:class|exception):: (\w+)$", text, re.MULTILINE)
    assert set(perqueue.__all__) - {"__version__"} <= set(shown)
