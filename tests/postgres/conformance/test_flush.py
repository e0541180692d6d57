"""Those of tests/wire/test_flush.py."""

from tests.wire.test_flush import *
