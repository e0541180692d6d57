"""Those of tests/outbox/test_reconcile.py."""

from tests.outbox.test_reconcile import *
