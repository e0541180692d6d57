"""The connections that the threads of a process share."""

import threading
from contextlib import closing

import pytest

from perqueue._address import DatabaseURL
from tests.helpers import until


@pytest.fixture
def connections(outbox):
    """One connection for all."""
    from perqueue._outbox.postgres.connection import Connections

    with closing(Connections(DatabaseURL(outbox), most=1)) as opened:
        yield opened


def test_whoever_waits_comes_before_whoever_comes_back(connections):
    """A thread that records without a pause lets those have a connection that have waited for one."""
    order = []

    def wait():
        connection = connections.take()
        order.append("waited")
        connections.give_back(connection)

    for _ in range(20):
        mine = connections.take()
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: connections._line, "the thread waits")
        connections.give_back(mine)
        mine = connections.take()
        order.append("came back")
        connections.give_back(mine)
        thread.join()
    assert order == ["waited", "came back"] * 20


def test_who_waits_in_vain_loses_no_connection(connections):
    """A wait that ends without a connection takes none from those that come later."""
    from perqueue._outbox.postgres.connection import TimedOutError

    mine = connections.take()
    with pytest.raises(TimedOutError):
        connections.take(0.01)
    connections.give_back(mine)
    assert connections.take() is mine
    connections.give_back(mine)
