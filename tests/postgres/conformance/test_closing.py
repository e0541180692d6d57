"""Those of tests/wire/test_closing.py."""

from tests.wire.test_closing import *
