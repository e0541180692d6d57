"""A flush that can be watched, and given up while nothing moves."""

import time

import pytest

from perqueue import FlushTimeout
from perqueue.cli._flush import Stopped, watched_flush


def watch(queue, looks, pause=time.sleep):
    watched_flush(queue, timeout=None, patience=0.3, look=looks.append, pause=pause)


def test_it_is_given_up_when_nothing_moves(make_queue, per):
    """Without a timeout it ends when nothing was settled for so long, and says how many are kept, and why."""
    per.go_down()
    queue, looks = make_queue(), []
    queue.record("GROUP_A", "USER_1")
    began = time.monotonic()
    with pytest.raises(FlushTimeout, match=r"nothing was accepted for 0\.3 s, 1 activity kept") as told:
        watch(queue, looks)
    assert told.value.pending == looks[-1].pending == 1
    assert time.monotonic() - began < 15


def test_it_ends_when_it_is_told_to(make_queue, per):
    """Whoever waits may end the wait; the activities stay."""
    per.go_down()
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(Stopped):
        watch(queue, [], pause=lambda _: True)
    assert queue.stats().pending == 1
