"""Those of tests/faults/test_servers.py: workers that fork around connections to a database."""

from tests.faults.test_servers import *
