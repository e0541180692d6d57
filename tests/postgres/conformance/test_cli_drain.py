"""Those of tests/cli/test_drain.py."""

from tests.cli.test_drain import *
