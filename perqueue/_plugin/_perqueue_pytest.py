"""The pytest plugin of perqueue: fixtures over `perqueue.testing`, which is loaded when one is used.

Apart from the package, because pytest loads plugins before anything measures coverage, and in every run of
everybody who has perqueue installed: that must cost nothing.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from perqueue import PerQueue
    from perqueue.testing import LocalPer

_RUN: pytest.StashKey[tuple[LocalPer, str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the option with which a whole run has one Per."""
    parser.addini(
        "per_environment",
        "lead every PerQueue() to a local Per for the whole run, from before conftest.py is imported",
        type="bool",
        default=False,
    )


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Set the variables before the application is imported, if the whole run is to have them."""
    if not early_config.getini("per_environment"):
        return
    from perqueue.testing import sandbox_environment

    stack = ExitStack()
    early_config.add_cleanup(stack.close)
    per = stack.enter_context(sandbox_environment())
    early_config.stash[_RUN] = per, os.environ["PERQUEUE_OUTBOX"]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin each test of such a run with a Per that has received nothing."""
    run = item.config.stash.get(_RUN, None)
    if run is not None:
        from perqueue.testing import begin_test

        begin_test(*run)


@pytest.fixture
def per_sandbox(request: pytest.FixtureRequest) -> Iterator[LocalPer]:
    """Provide a local Per that listens, and that has received nothing: a `perqueue.testing.LocalPer`."""
    run = request.config.stash.get(_RUN, None)
    if run is not None:
        yield run[0]
        return
    from perqueue.testing import LocalPer

    with LocalPer() as per:
        yield per


@pytest.fixture
def per_queue(per_sandbox: LocalPer, tmp_path: Path) -> Iterator[PerQueue]:
    """Provide a queue with an outbox of its own that delivers to `per_sandbox`; it is closed at the end."""
    from perqueue.testing import sandbox_queue

    with sandbox_queue(tmp_path / "per_queue.db", per=per_sandbox) as (queue, _):
        yield queue


@pytest.fixture
def per_environment(
    request: pytest.FixtureRequest, per_sandbox: LocalPer, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """Set the variables that lead the application's own `PerQueue()` to `per_sandbox`, and provide them."""
    run = request.config.stash.get(_RUN, None)
    if run is not None:
        yield per_sandbox.environment(run[1])
        return
    from perqueue.testing import sandbox_environment

    outbox = tmp_path / "per_environment.db"
    with sandbox_environment(outbox, per=per_sandbox):
        yield per_sandbox.environment(outbox)
