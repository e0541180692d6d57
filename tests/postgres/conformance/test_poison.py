"""Those of tests/wire/test_poison.py."""

from tests.wire.test_poison import *
