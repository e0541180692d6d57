"""Who is always one too many, and when it is everybody."""

import random

import pytest

from perqueue._delivery.judge import _Throttles


def test_one_that_is_always_refused_among_many_that_are_taken_is_told():
    """Whatever Per limits there, it is not the rate of all: four others were taken, and none refused."""
    throttles = _Throttles()
    assert not throttles.refused(1)
    for _ in range(3):
        throttles.taken()
    assert not throttles.refused(1)
    throttles.taken()
    assert throttles.refused(1)


def test_a_few_that_are_always_refused_are_told():
    """Five among two hundred are told apart although each of them sees the others refused."""
    throttles, told = _Throttles(), set()
    for _ in range(3):
        told |= {number for number in range(5) if throttles.refused(number)}
        for _ in range(40):
            throttles.taken()
    assert told == set(range(5))


@pytest.mark.parametrize("taken", [0.0, 0.2, 0.5])
def test_where_all_are_limited_nobody_is_told(taken):
    """As long as Per refuses half of what is sent, the rate is too high: that is nobody's own affair."""
    chance, throttles = random.Random(7), _Throttles()
    waiting = list(range(100))
    for number in range(100, 3_000):
        each = waiting.pop(0)
        if chance.random() < taken:
            throttles.taken()
            throttles.forget(each)
            waiting.append(number)
        else:
            assert not throttles.refused(each)
            waiting.append(each)
