"""Those of tests/cli/test_history.py."""

from tests.cli.test_history import *
