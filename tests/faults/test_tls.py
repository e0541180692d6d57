"""Certificates that are not to be trusted: nothing is sent, nothing is lost, and the reason is shown."""

import json
import logging
import ssl
import time
from datetime import UTC, datetime, timedelta

import pytest
import trustme
from click.testing import CliRunner

from perqueue import FlushTimeout, PerAPIError, RetryPolicy
from perqueue._stats import DrainState
from perqueue.cli import main
from tests.faults._raw_server import RawServer, answer_to

REPORT = b'{"ok": true, "result": {"start": null, "end": null, "activityTypes": {}}}'


@pytest.fixture(scope="module")
def authority():
    """The certificate authority that the client trusts."""
    return trustme.CA()


@pytest.fixture(scope="module")
def trust(authority):
    """What a queue is given as `verify`."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def served_with(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    return context


LONG_AGO = datetime.now(UTC) - timedelta(days=2)
BAD = {
    "wrong host": (lambda ca: ca.issue_cert("elsewhere.example"), "not valid for 'localhost'"),
    "expired": (lambda ca: ca.issue_cert("localhost", not_after=LONG_AGO), "certificate has expired"),
    "unknown authority": (lambda _: trustme.CA().issue_cert("localhost"), "unable to get local issuer"),
}


@pytest.fixture(params=BAD)
def bad(request, authority):
    """Yield a server with a bad certificate, and words that must be said about it."""
    make, words = BAD[request.param]

    with RawServer(tls=served_with(make(authority))) as server:
        yield server, words


def test_a_bad_certificate_is_shown_and_loses_nothing(bad, make_queue, outbox, trust, caplog):
    """The activity stays pending, nobody is sent a request, and `stats()`, `flush()`, `perqueue status` and
    one line of the log name the certificate and the remedy.
    """
    server, words = bad
    caplog.set_level(logging.INFO, "perqueue")
    queue = make_queue(base_url=server.url, verify=trust, retry=RetryPolicy(base=0.05, cap=0.1))
    for number in range(3):
        queue.record("GROUP_A", f"USER_{number}")
    with pytest.raises(FlushTimeout) as caught:
        queue.flush(timeout=1)
    stats = queue.stats()
    assert (stats.pending, stats.state) == (3, DrainState.BACKING_OFF)
    shown = CliRunner().invoke(main, ["status", "--json", "--outbox", str(outbox)], env={"PER_BASE_URL": ""})
    for text in (stats.reason, caught.value.reason, str(caught.value), json.loads(shown.output)["reason"]):
        assert "certificate is not trusted" in text
        assert words in text
        assert "verify=ssl.create_default_context" in text
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert words in line.getMessage()
    assert server.requests == []


def test_a_report_over_a_bad_certificate_says_so(bad, make_queue, trust):
    """`get_report()` raises what is wrong with the certificate, at once, and sends nobody the token."""
    server, words = bad
    queue = make_queue(base_url=server.url, verify=trust, drain=False)
    began = time.monotonic()
    with pytest.raises(PerAPIError, match="certificate is not trusted") as caught:
        queue.get_report()
    assert time.monotonic() - began < 5
    assert words in str(caught.value)
    assert "verify=" in str(caught.value)
    assert server.requests == []


def test_a_trusted_certificate_is_delivered_to(make_queue, authority, trust):
    """A control, and the remedy: with the authority in `verify`, the same server gets everything."""

    def answer(wire, request):
        if b"reports.get" in request:
            wire.send(answer_to(request, REPORT))
        else:
            wire.accept(request)

    with RawServer(answer, served_with(authority.issue_cert("localhost"))) as server:
        refused = make_queue(base_url=server.url, retry=RetryPolicy(base=0.05, cap=0.1))
        refused.record("GROUP_A", "USER_1")
        with pytest.raises(FlushTimeout, match="certificate is not trusted"):
            refused.flush(timeout=0.5)
        refused.close()
        queue = make_queue(base_url=server.url, verify=trust)
        queue.flush(10)
        assert queue.get_report().rows() == []
        assert server.accepted == {"USER_1": 1}


def test_a_server_without_tls_is_no_answer(per, make_queue, until):
    """Plain HTTP behind an https URL is told as a failure of TLS; nothing is sent in the clear."""
    queue = make_queue(base_url=per.url.replace("http:", "https:"))
    queue.record("GROUP_A", "USER_1")
    until(lambda: "SSL" in (queue.stats().reason or ""))
    assert queue.stats().pending == 1
    assert per.requests == 0
