"""Those of tests/wire/test_outage.py."""

from tests.wire.test_outage import *
