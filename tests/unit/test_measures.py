"""What is measured: closed sets of outcomes and errors, and samples that favour nobody."""

import asyncio

import pytest

from perqueue._activity import Activity, Outcome, Verdict
from perqueue._measures import SAMPLES, Error, Kind, MeasuredDeliverer, Measures, Sample, error_of, kind_of
from perqueue._settings import resolve_client_settings
from perqueue._wire.exchange import Wire
from perqueue.sandbox import (
    BadToken,
    Disconnect,
    HalfBody,
    Hang,
    Html,
    OkWithoutResult,
    RateLimited,
    Redirect,
    Refuse,
    ResetBeforeAccepting,
    Status,
    TruncatedJson,
)

ACTIVITY = Activity(id=1, billing_id="GROUP", user_id="USER", activity_type_id="TYPE", recorded_at=0)


def deliver(**options):
    options = dict.fromkeys(("activity_token", "reporting_token", "activity_type_id", "base_url")) | options
    options = {"request_timeout": 5.0, "proxy": None, "verify": True, "transport": None} | options

    async def once():
        measures = Measures()
        deliverer = MeasuredDeliverer(Wire(resolve_client_settings({}, **options)), measures)
        try:
            return await deliverer.deliver(ACTIVITY), measures
        finally:
            await deliverer.aclose()

    return asyncio.run(once())


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (None, None),
        (Refuse("no such group 17"), Error.REFUSED),
        (BadToken(), Error.BAD_TOKEN),
        (RateLimited(1), Error.RATE_LIMITED),
        (Status(503), Error.HTTP_5XX),
        (Status(408), Error.HTTP_4XX),
        (Redirect(), Error.HTTP_3XX),
        (Refuse("Please try again later"), Error.UNAVAILABLE),
        (Html(), Error.NOT_PER),
        (OkWithoutResult(), Error.NOT_PER),
        (TruncatedJson(), Error.NOT_PER),
        (HalfBody(), Error.CONNECTION),
        (Hang(), Error.TIMEOUT),
        (Disconnect(), Error.CONNECTION),
        (ResetBeforeAccepting(), Error.CONNECTION),
    ],
    ids=lambda each: str(each) if isinstance(each, Error) else type(each).__name__,
)
def test_every_answer_has_its_kind_of_error(per, fault, error):
    """Whatever Per or something before it answers is counted under one of a few words, never its own."""
    if fault is not None:
        per.set_fault(fault)
    outcome, measures = deliver(activity_token=per.activity_token, base_url=per.url, request_timeout=0.3)
    assert error_of(outcome) is error, outcome
    assert measures.requests[kind_of(outcome), error] == 1
    [(seconds, kind)] = measures.requested.take()
    assert 0 < seconds < 10
    assert kind is kind_of(outcome)


@pytest.mark.parametrize(
    ("url", "error"),
    [("http://127.0.0.1:9", Error.CONNECT), ("https://no-such-host.invalid", Error.NAME)],
)
def test_no_way_to_per_has_its_kind_of_error(url, error):
    """A port that nobody listens on, and a name that nobody knows, are told apart."""
    outcome, _ = deliver(activity_token="t" * 20, base_url=url)
    assert error_of(outcome) is error, outcome


def test_a_token_that_cannot_be_had_is_no_refused_token():
    """A vault that fails is told apart from a token that Per refuses."""
    outcome, _ = deliver(activity_token=lambda: 1 / 0, base_url="http://127.0.0.1:9")
    assert error_of(outcome) is Error.NO_TOKEN


@pytest.mark.parametrize("status", [None, 0, 100, 204, 301, 404, 500, 999])
@pytest.mark.parametrize("reason", [None, "", "HTTP 404: no", "x" * 500, "USER_1 is unknown"])
@pytest.mark.parametrize("verdict", Verdict)
def test_there_are_no_other_errors(verdict, status, reason):
    """No text that came from anywhere makes a new attribute: metrics stay few, and hold no ID."""
    outcome = Outcome(verdict=verdict, status=status, reason=reason)
    assert isinstance(kind_of(outcome), Kind)
    assert error_of(outcome) is None or isinstance(error_of(outcome), Error)
    assert (error_of(outcome) is None) == (verdict is Verdict.ACCEPTED)


def test_a_few_values_are_all_kept():
    """As long as there is room nothing is left out, and what was taken is forgotten."""
    sample = Sample()
    for number in range(SAMPLES):
        sample.add(number)
    assert sample.take() == list(range(SAMPLES))
    assert sample.take() == []


def test_of_many_values_each_is_as_likely():
    """Of ten times as many as there is room for, early and late ones are kept alike; memory is bounded."""
    sample = Sample()
    for number in range(10 * SAMPLES):
        sample.add(number)
    taken = sample.take()
    assert len(taken) == len(set(taken)) == SAMPLES
    middle = sum(taken) / SAMPLES
    assert abs(middle - 5 * SAMPLES) < 10 * SAMPLES * 0.06  # six standard errors of a mean
