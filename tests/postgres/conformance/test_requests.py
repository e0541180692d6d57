"""Those of tests/wire/test_requests.py."""

from tests.wire.test_requests import *  # noqa: F403
