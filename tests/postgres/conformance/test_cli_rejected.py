"""Those of tests/cli/test_rejected.py."""

from tests.cli.test_rejected import *
