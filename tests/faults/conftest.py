"""No coverage in the fault tests.

Coverage traces every line, which slows the races of these tests by a multiple, and what they run is covered
by the other tests.
"""

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
    """Measure no coverage in the tests of this directory."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("no_cover")


@pytest.fixture(autouse=True)
def _children_are_not_measured(monkeypatch):
    """No child of these tests measures coverage."""
    for name in [name for name in os.environ if name.startswith(("COVERAGE_", "COV_"))]:
        monkeypatch.delenv(name)
