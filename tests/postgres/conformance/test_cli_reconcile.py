"""Those of tests/cli/test_reconcile.py."""

from tests.cli.test_reconcile import *
