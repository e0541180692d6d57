"""`docs/recipes` is a promise: what it shows stands in the examples, and the walk-through gets there."""

import os
import re
import shlex
import subprocess
import sysconfig

import pytest

from perqueue.cli import main
from tests.faults._needs import needs
from tests.helpers import Child, free_port, until
from tests.recipes.conftest import EXAMPLES

PAGES = sorted((EXAMPLES.parent / "docs" / "recipes").glob("*.md"))
RUN_AS_THEY_ARE = {"script.md", "# shop/tests.py"}  # by other tests
BIN = sysconfig.get_path("scripts")


def blocks(page, language):
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def sources():
    written = (path for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return "\n".join(path.read_text(encoding="utf-8") for path in written)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_is_in_the_examples(page):
    """Each Python block of a recipe stands in an example, word for word, and the tests run that."""
    examples = sources()
    for block in blocks(page, "python"):
        if page.name not in RUN_AS_THEY_ARE and block.splitlines()[0] not in RUN_AS_THEY_ARE:
            assert block in examples, block


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_of_a_page_exist(page):
    """Every link of a recipe leads somewhere, and every example that it names is there."""
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert "://" in link or (page.parent / link).resolve().exists(), link
    for name in re.findall(r"`(examples/[\w/.-]+)`", text):
        assert (EXAMPLES.parent / name).exists(), name


def test_every_recipe_is_in_the_table():
    """The first page leads to all others."""
    index = (EXAMPLES.parent / "docs" / "recipes" / "index.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if f"({page.name})" not in index] == ["index.md"]


def test_perqueue_commands_of_the_recipes_exist():
    """Every `perqueue …` of a recipe is a command with these options."""
    lines = [line for page in PAGES for text in blocks(page, "console") for line in text.splitlines()]
    found = [match[0] for line in lines if (match := re.search(r"\bperqueue [a-z][^|]*", line))]
    found += [each for page in PAGES for each in re.findall(r"`(perqueue [a-z][^`]*)`", page.read_text())]
    assert len(found) > 10
    for command in found:
        name, *arguments = shlex.split(command)[1:]
        known = main.commands[name]
        known.make_parser(known.make_context(name, [], resilient_parsing=True)).parse_args(arguments)


def walk_through():
    """Return the terminals of the walk-through: a list of commands for each console block."""
    return [
        text.splitlines() for text in blocks(EXAMPLES.parent / "docs" / "recipes" / "fastapi.md", "console")
    ]


def test_the_walk_through_leads_to_delivered_activities(tmp_path):
    """The commands of the FastAPI page, from the local Per to the report, do what the page says.

    Only the installation is left out: this environment has it all.
    """
    needs("fastapi", "uvicorn")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PER", "COV"))}
    env = clean | {"PATH": f"{BIN}:{clean['PATH']}", "PYTHONUNBUFFERED": "1"}
    _, sandbox, server, requests, report = walk_through()
    ports = {"8420": str(free_port()), "8000": str(free_port())}
    (tmp_path / "examples").symlink_to(EXAMPLES)

    def shell(lines, *, wait):
        script = "\n".join(line for line in lines if not line.startswith(". "))
        script = script.replace("--workers 2", "--workers 2 --port 8000").replace(
            "perqueue sandbox", "exec perqueue sandbox"
        )
        script = script.replace("uvicorn --app", "exec uvicorn --app")
        script = re.sub("|".join(ports), lambda port: ports[port[0]], script)
        if wait:
            return subprocess.check_output(
                ["sh", "-ec", script], env=env, cwd=tmp_path, text=True, timeout=60
            )
        become = "import os, sys\nos.chdir(sys.argv[2])\nos.execvp('sh', ['sh', '-c', sys.argv[1]])"
        return Child(become, script, tmp_path, env=env, isolated=True, measured=False)

    with shell(sandbox, wait=False), shell(server, wait=False) as uvicorn:
        until(lambda: "startup complete" in uvicorn.errors(), "uvicorn is up", 30)
        output = shell(requests, wait=True)
        assert output.count('{"export":"done"}') == 3
        until(lambda: "delivered  3" in shell(requests[-1:], wait=True), "all are delivered", 20)
        assert re.search(r"EXPORT +ACME +2$", shell(report, wait=True), re.MULTILINE)
        uvicorn.process.terminate()
        assert uvicorn.wait(20) == 0
