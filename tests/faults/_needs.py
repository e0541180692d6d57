"""What only some tests need: without it they are reported as skipped, by name."""

import importlib.util

import pytest


def needs(*modules):
    """Skip the test unless these are installed; none is imported, for that may patch or fork."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
