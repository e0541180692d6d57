"""Those of tests/wire/test_receipts.py."""

from tests.wire.test_receipts import *
