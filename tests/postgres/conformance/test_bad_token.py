"""Those of tests/wire/test_bad_token.py."""

from tests.wire.test_bad_token import *
