"""What travels to Per: exactly what was recorded, and nothing that was not asked for."""

import itertools
import random
import ssl
import unicodedata

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perqueue import ActivityRejected, FlushTimeout, __version__
from perqueue._wire.tls import tls_context
from perqueue.sandbox import Redirect, Sandbox

ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=80)


def odd_ids():
    """Return 300 different IDs that break whoever quotes, joins, strips or normalises them."""
    chosen = [chr(code) for code in range(1, 128)]
    chosen += [
        "a b",
        " a",
        "a ",
        "a+b",
        "%",
        "%2F",
        "%00",
        "%zz",
        "a%20b",
        "a&b=c",
        "a?b",
        "a#b",
        "a/b",
        "../..",
        ".",
    ]
    chosen += [
        "..",
        "//",
        "\\\\",
        "\r\n",
        "a\r\nX-Evil: 1",
        "a;b",
        "a=b",
        "&",
        "null",
        "None",
        "0",
        "-1",
        "1e9",
    ]
    chosen += [
        "' OR 1=1 --",
        '"; DROP TABLE perqueue_activity; --',
        "<script>",
        "${x}",
        "{{x}}",
        "$(x)",
        "`x`",
    ]
    chosen += [
        "é",
        "e\u0301",
        "ﬁ",
        "\u017f",
        "İ",
        "ß",
        "日本",
        "日本語" * 40,
        "\U0001f600",
        "👩\u200d👩\u200d👧",
        "\u202eevil",
    ]
    chosen += [
        "\ufeffx",
        "x\u200b",
        "\u2028",
        "\u2029",
        "\x85",
        "\xa0",
        "\xad",
        "\uffff",
        "\U0010ffff",
        "\ue000",
        "ﷺ",
    ]
    chosen += ["x" * 400, "é" * 200, "\U0001f600" * 100, "%" * 400, " " * 400, "a/" * 200]
    chance = random.Random(7)
    odd = dict.fromkeys(chosen)
    while len(odd) < 300:
        odd["".join(chr(chance.choice([*range(1, 0x300), *range(0x2000, 0x2100)])) for _ in range(20))] = None
    return list(odd)


def test_three_hundred_odd_ids_arrive_exactly(per, make_queue):
    """Every ID arrives character for character, and each receipt has its own transaction ID."""
    queue = make_queue()
    odd = odd_ids()
    others = [*odd[1:], odd[0]]
    receipts = {pair: queue.record(*pair) for pair in zip(odd, others, strict=True)}
    queue.flush(20)
    received = {activity.transaction_id: activity for activity in per.activities}
    assert len(received) == 300
    for (billing_id, user_id), receipt in receipts.items():
        activity = received[receipt.wait(0)]
        assert (activity.billing_id, activity.user_id) == (billing_id, user_id)
        assert activity.activity_type_id == per.activity_type_id


def test_the_check_of_odd_ids_sees_a_changed_one(per, make_queue):
    """A control: an ID that is normalised on its way is noticed by what the test above compares."""

    async def normalise(request):
        params = {name: unicodedata.normalize("NFC", text) for name, text in request.url.params.items()}
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(request.url.copy_with(params=params), headers=request.headers)

    queue = make_queue(transport=httpx.MockTransport(normalise))
    queue.record("e\u0301", "USER_1")
    queue.flush(5)
    assert per.activities[0].billing_id == "é"
    assert per.activities[0].billing_id != "e\u0301"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(billing_id=ids, user_id=ids, activity_type_id=ids)
def test_any_text_survives_outbox_and_wire(per, make_shared_queue, billing_id, user_id, activity_type_id):
    """Whatever text an ID is, what Per receives is what was recorded."""
    queue = make_shared_queue()
    transaction_id = queue.record(billing_id, user_id, activity_type_id=activity_type_id).wait(5)
    activity = per.activities[-1]
    assert activity.transaction_id == transaction_id
    assert (activity.billing_id, activity.user_id, activity.activity_type_id) == (
        billing_id,
        user_id,
        activity_type_id,
    )


@pytest.fixture
def make_shared_queue(make_queue):
    """One queue for all examples of a property test."""
    made = []

    def make():
        if not made:
            made.append(make_queue())
        return made[0]

    return make


def test_every_request_says_who_asks_and_forbids_caches(per, make_queue):
    """A request has the token, our version and `no-store`, and nothing of the surroundings (invariant 9)."""
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    queue.flush(5)
    queue.get_report()
    add, report = per.request_log
    assert (add.method, add.path, report.method, report.path) == (
        "GET",
        "/activities.add",
        "GET",
        "/reports.get",
    )
    assert add.headers["Authorization"] == f"Bearer {per.activity_token}"
    assert report.headers["Authorization"] == f"Bearer {per.reporting_token}"
    for request in (add, report):
        assert request.headers["User-Agent"] == f"useper-perqueue/{__version__}"
        assert request.headers["Cache-Control"] == "no-store"
        assert request.headers["Accept"] == "application/json"
        assert {name.lower() for name in request.headers} == {
            "host",
            "authorization",
            "user-agent",
            "accept",
            "accept-encoding",
            "cache-control",
        }
    assert set(add.parameters) == {"billingId", "userId", "activityTypeId"}
    assert report.parameters == {}


def test_a_path_in_the_base_url_is_kept(make_queue):
    """Per behind a gateway's path is asked there."""
    seen = []

    def answer(request):
        seen.append(request.url.raw_path.decode())
        return httpx.Response(200, json={"ok": True, "result": {"transactionId": "t1"}})

    queue = make_queue(base_url="https://gateway.example/per/v1/", transport=httpx.MockTransport(answer))
    queue.record("GROUP_A", "USER 1")
    queue.flush(5)
    (path,) = seen
    assert path.startswith("/per/v1/activities.add?billingId=GROUP_A&userId=USER%201&")


def test_cookies_are_not_kept(make_queue):
    """What a server sets is not sent back (invariant 9)."""
    cookies = []

    def answer(request):
        cookies.append(request.headers.get("Cookie"))
        return httpx.Response(
            200,
            headers={"Set-Cookie": "session=tracked; Path=/"},
            json={"ok": True, "result": {"transactionId": f"t{len(cookies)}"}},
        )

    queue = make_queue(transport=httpx.MockTransport(answer))
    for number in range(5):
        queue.record("GROUP_A", f"USER_{number}").wait(5)
    assert cookies == [None] * 5


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(per, make_queue, until, status):
    """A redirect is not an answer, and the token goes nowhere else (invariants 2, 9)."""
    with Sandbox() as elsewhere:
        per.set_fault(
            Redirect(f"{elsewhere.url}/activities.add?billingId=x&userId=y&activityTypeId=z", status)
        )
        queue = make_queue()
        queue.record("GROUP_A", "USER_1")
        until(lambda: f"HTTP {status}" in (queue.stats().reason or ""))
        with pytest.raises(FlushTimeout, match=f"HTTP {status}"):
            queue.flush(timeout=0.1)
        assert elsewhere.requests == 0
    assert queue.stats().pending == 1


@pytest.fixture
def elsewhere():
    """A server that nobody should speak to."""
    with Sandbox() as sandbox:
        yield sandbox
        assert sandbox.requests == 0


def test_proxies_of_the_environment_are_ignored(per, make_queue, elsewhere, monkeypatch):
    """Neither proxy nor .netrc nor certificates come from the environment (invariant 9)."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name, lower in itertools.product(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), (False, True)):
        monkeypatch.setenv(name.lower() if lower else name, elsewhere.url)
    monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent")
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    queue.flush(5)
    queue.get_report()
    assert per.accepted == 1
    assert per.requests == 2


@pytest.mark.parametrize("verify", [True, False])
def test_keys_of_a_session_are_written_nowhere(tmp_path, monkeypatch, verify):
    """Whoever may set SSLKEYLOGFILE cannot read the token from the network (invariant 9)."""
    log = tmp_path / "keys"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    assert ssl.create_default_context().keylog_filename == str(log)  # Python's own contexts do
    assert not tls_context(verify=verify).keylog_filename


def test_a_netrc_file_is_ignored(per, make_queue, tmp_path, monkeypatch):
    """Credentials that lie around for the host are not sent (invariant 9)."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    queue = make_queue()
    queue.record("GROUP_A", "USER_1")
    queue.flush(5)
    assert per.request_log[0].headers["Authorization"] == f"Bearer {per.activity_token}"


def test_a_proxy_comes_from_the_option(per, make_queue):
    """With `proxy=` the request goes there: the sandbox knows no absolute URLs, and says so."""
    queue = make_queue(base_url="http://localhost:9", proxy=per.url)
    queue.record("GROUP_A", "USER_1")
    with pytest.raises(ActivityRejected, match="not_found"):
        queue.flush(timeout=5)


def test_many_requests_share_few_connections(per, make_queue):
    """Connections are kept alive: there are never more than requests in flight."""
    queue = make_queue(max_in_flight=4)
    for number in range(200):
        queue.record("GROUP_A", f"USER_{number}")
    queue.flush(10)
    assert per.max_concurrent <= 4
    assert len(queue._worker._loop._selector.get_map() if queue._worker._loop else ()) <= 4 + 4


def test_max_in_flight_is_never_exceeded(make_queue):
    """However many are pending, at most `max_in_flight` requests are under way."""
    with Sandbox(latency=0.01) as slow:
        queue = make_queue(base_url=slow.url, max_in_flight=5)
        for number in range(100):
            queue.record("GROUP_A", f"USER_{number}")
        queue.flush(10)
        assert slow.accepted == 100
        assert slow.max_concurrent == 5


def test_a_transport_of_the_network_serves_every_event_loop(per, make_queue, tmp_path):
    """`transport=httpx.AsyncHTTPTransport()` delivers, reports, and serves the next queue, too: no event
    loop is lent a connection of another's.
    """
    transport = httpx.AsyncHTTPTransport(trust_env=False)
    for name in ("first.db", "second.db"):
        queue = make_queue(tmp_path / name, transport=transport, request_timeout=2)
        for number in range(30):
            queue.record("GROUP_A", f"{name} {number}")
            if number % 10 == 0:
                queue.get_report()
        queue.flush(10)
        queue.get_report()
        queue.close()
    assert per.accepted == 60
    assert per.requests == 60 + 8
    assert not transport._pool.connections
