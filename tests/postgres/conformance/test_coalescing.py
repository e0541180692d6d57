"""Those of tests/outbox/test_coalescing.py."""

from tests.outbox.test_coalescing import *
