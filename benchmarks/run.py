"""Run all benchmarks: one table, the plots, and the tables in docs/.

make bench                         # everything: an hour or less, some GB, on a machine that does nothing else
make bench ARGS="--only drain"     # one of them, and what the others found before
make bench-smoke                   # a few calls of each: do they still run?
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import _report
from _frame import HERE, Row, machine

PLOTS = HERE.parent / "docs" / "plots"


def scripts() -> list[str]:
    """Return the names of the benchmarks."""
    return sorted(path.stem for path in HERE.glob("[a-z]*.py") if path.stem != Path(__file__).stem)


def run(name: str, *, smoke: bool) -> list[Row]:
    """Run one benchmark and return what it found; what it prints is shown if it fails."""
    if name == "postgres":
        from _postgres_server import binaries

        if binaries() is None:
            print("postgres: skipped, PostgreSQL's server is not installed (Debian: postgresql)")
            return []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        command = [
            sys.executable,
            str(HERE / f"{name}.py"),
            "--json",
            str(file),
            *(["--smoke"] if smoke else []),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            print(done.stdout)
            sys.exit(f"{name} failed: exit code {done.returncode}")
        rows = read(file)
    if not rows:
        sys.exit(f"{name} measured nothing")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return rows


def read(file: Path) -> list[Row]:
    """Return the rows that a benchmark has written."""
    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]


def draw(results: _report.Results, folder: Path) -> None:
    """Write the plots, where they can be drawn."""
    try:
        import _plots
    except ModuleNotFoundError as error:
        print(f"skipped: the plots ({error.name} is not installed)", file=sys.stderr)
        return
    _plots.draw(results, folder)


def main() -> None:
    """Run what is asked for, and show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few calls of each case; nothing is kept")
    parser.add_argument("--only", choices=scripts(), action="append", help="run only this one (repeatable)")
    parser.add_argument(
        "--merge", type=Path, nargs="*", metavar="FILE", help="run nothing: take these results"
    )
    given = parser.parse_args()
    results = {} if given.smoke or (given.only is None and given.merge is None) else _report.load()
    for file in given.merge or ():
        name = json.loads(file.read_text(encoding="utf-8"))["benchmark"]
        _report.merge(results, name, machine(), read(file))
    if given.merge is None:
        names = given.only or scripts()
        # Whether a benchmark still runs may be seen of two at a time; what it measures may not.
        with ThreadPoolExecutor(2 if given.smoke else 1) as several:
            for name, rows in zip(names, several.map(partial(run, smoke=given.smoke), names), strict=True):
                _report.merge(results, name, machine(), rows)
    print(f"\n{machine()}\n")
    print("\n\n".join(_report.terminal(results)))
    if given.smoke:
        with tempfile.TemporaryDirectory() as folder:
            draw(results, Path(folder))
        return
    _report.save(results)
    results = _report.load()
    draw(results, PLOTS)
    for document in _report.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        document.write_text(_report.documented(text, results), encoding="utf-8")


if __name__ == "__main__":
    main()
