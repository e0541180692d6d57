import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import httpx
import pytest

from perqueue.sandbox import (
    BadToken,
    CloseAfterAnswer,
    Disconnect,
    Drip,
    HalfBody,
    Hang,
    Html,
    HugeBody,
    Latency,
    OkWithoutResult,
    RateLimit,
    RateLimited,
    Redirect,
    Refuse,
    ResetAfterAccepting,
    ResetBeforeAccepting,
    ResultId,
    Sandbox,
    Status,
    TruncatedJson,
)

# --- Answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Status(500, "oops", "text/plain"), (500, "text/plain", "oops")),
        (Status(503), (503, "text/plain", "something broke")),
        (Refuse("no such group"), (200, "application/json", '{"ok": false, "message": "no such group"}')),
        (Refuse("no", key="error", status=400), (400, "application/json", '{"ok": false, "error": "no"}')),
        (BadToken(), (401, "application/json", '{"ok": false, "message": "invalid_auth_token"}')),
        (RateLimited(), (429, "application/json", '{"ok": false, "message": "rate_limited"}')),
        (OkWithoutResult(), (200, "application/json", '{"ok": true}')),
    ],
)
def test_a_fault_answers_what_it_says(per, add, fault, expected):
    """The answer is the fault's, and the activity is not counted."""
    per.set_fault(fault)
    answer = add()
    assert (answer.status_code, answer.headers["Content-Type"], answer.text) == expected
    assert per.activities == ()
    assert (per.request_log[0].fault, per.request_log[0].accepted) == (fault.name, False)


@pytest.mark.parametrize("status", [200, 502, 599])
def test_a_page_for_humans_is_html(per, add, status):
    """HTML comes as HTML, whatever the status."""
    per.set_fault(Html(status))
    answer = add()
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "text/html")
    assert answer.text.startswith("<!DOCTYPE html>")


def test_a_redirect_names_its_location(per, add):
    """A redirect has the status and the location that it was given."""
    per.set_fault(Redirect("http://elsewhere.example/", 307))
    answer = add()
    assert (answer.status_code, answer.headers["Location"]) == (307, "http://elsewhere.example/")


@pytest.mark.parametrize(("value", "header"), [(7, "7"), ("soon", "soon"), (1.5, "1.5")])
@pytest.mark.parametrize("kind", [RateLimited, lambda retry_after: Status(503, retry_after=retry_after)])
def test_retry_after_is_sent_as_given(per, add, kind, value, header):
    """Seconds and nonsense alike."""
    per.set_fault(kind(retry_after=value))
    assert add().headers["Retry-After"] == header


def test_retry_after_may_be_a_date(per, add):
    """The seconds become an HTTP date in the future."""
    per.set_fault(RateLimited(120, as_date=True))
    header = add().headers["Retry-After"]
    assert header.endswith(" GMT")
    date = parsedate_to_datetime(header)
    assert timedelta(seconds=110) < date - datetime.now(UTC) <= timedelta(seconds=120)


def test_retry_after_may_be_absent(per, add):
    """Without a value there is no such header."""
    per.set_fault(RateLimited())
    assert "Retry-After" not in add().headers


def test_the_home_pages_id_is_an_accepted_activity(per, add):
    """The answer names the transaction `id`, and it is the ledger's."""
    per.set_fault(ResultId())
    assert add().json() == {"ok": True, "result": {"id": per.activities[0].transaction_id}}


def test_truncated_json_is_complete_http(per, add):
    """The body has the length that it declares, and is no JSON; the activity counts unless told otherwise."""
    per.set_fault(TruncatedJson())
    answer = add()
    assert int(answer.headers["Content-Length"]) == len(answer.content) > 0
    with pytest.raises(json.JSONDecodeError):
        answer.json()
    assert per.accepted == 1
    per.set_fault(TruncatedJson(accept=False))
    add()
    assert per.accepted == 1


def test_a_fault_may_answer_badly_for_an_activity_that_counts(per, add):
    """A gateway's 502 can hide an activity that Per accepted."""
    per.set_fault(Status(502, accept=True))
    assert add().status_code == 502
    assert per.accepted == 1
    assert per.request_log[0].accepted is True


def test_a_fault_accepts_nothing_that_per_would_refuse(per, add):
    """An accepting fault still checks the token."""
    per.set_fault(CloseAfterAnswer())
    assert add(token="nobody").status_code == 401
    assert per.accepted == 0


# --- The connection ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "accepted"), [(ResetBeforeAccepting(), 0), (ResetAfterAccepting(), 1)])
def test_a_reset_is_a_tcp_reset(per, fault, accepted):
    """The client's read fails with ECONNRESET, and only the later reset leaves an activity behind."""
    per.set_fault(fault)
    with _raw_request(per) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1000)
    assert per.accepted == accepted


@pytest.mark.parametrize("accept", [True, False])
def test_half_a_body_declares_the_whole(per, accept):
    """Half of the declared bytes arrive, then the connection ends politely."""
    per.set_fault(HalfBody(accept=accept))
    with _raw_request(per) as connection:
        head, _, body = _read_to_end(connection).partition(b"\r\n\r\n")
    declared = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    assert len(body) == declared // 2 > 0
    assert per.accepted == accept


@pytest.mark.parametrize("accept", [True, False])
def test_a_disconnect_sends_nothing(per, accept):
    """The connection ends without a byte."""
    per.set_fault(Disconnect(accept=accept))
    with _raw_request(per) as connection:
        assert connection.recv(1000) == b""
    assert per.accepted == accept


def test_a_connection_may_close_behind_its_answer(per):
    """The answer is whole and says nothing of closing, yet the connection ends."""
    per.set_fault(CloseAfterAnswer())
    with _raw_request(per) as connection:
        head, _, body = _read_to_end(connection).partition(b"\r\n\r\n")
    assert b"connection: close" not in head.lower()
    assert json.loads(body)["ok"] is True
    assert per.accepted == 1


def test_a_drip_is_slow_but_true(per, add):
    """Each byte waits, and the whole is the true answer."""
    per.set_fault(Drip(0.002))
    began = time.monotonic()
    assert add().json()["result"]["transactionId"] == per.activities[0].transaction_id
    assert time.monotonic() - began > 0.1


def test_a_huge_body_is_huge_and_valid(per, add):
    """It has exactly the size asked for, and still is JSON."""
    per.set_fault(HugeBody(1_000_000))
    answer = add()
    assert len(answer.content) == 1_000_000
    assert answer.json()["ok"] is True


@pytest.mark.parametrize("fault", [Drip(0.001), HugeBody(50_000_000)])
def test_a_client_may_leave_in_the_middle(per, add, caplog, fault):
    """Nothing is logged, and the next request is served."""
    per.set_fault(fault, times=1)
    with _raw_request(per) as connection:
        connection.recv(50)
    assert add().status_code == 200
    assert caplog.records == [] or {record.name for record in caplog.records} == {"httpx"}


# --- Time ----------------------------------------------------------------------------------------------


def test_latency_delays_the_answer_not_the_activity(per, client):
    """A client that gives up has its activity counted all the same."""
    per.set_fault(Latency(30))
    with pytest.raises(httpx.ReadTimeout):
        _get(per, client, timeout=0.05)
    assert per.accepted == 1


def test_latency_delays_every_answer():
    """The constructor's latency delays reports, too, and only by that much."""
    with Sandbox(latency=0.05) as per:
        began = time.monotonic()
        httpx.get(f"{per.url}/reports.get")
        assert 0.05 <= time.monotonic() - began < 5


@pytest.mark.parametrize("accept", [True, False])
def test_a_hanging_request_is_released(per, client, accept):
    """Released, it gets the true answer if its activity counts, and none otherwise."""
    per.set_fault(Hang(accept=accept), times=1)
    outcome = []

    def send():
        try:
            outcome.append(_get(per, client).json()["ok"])
        except httpx.RemoteProtocolError:
            outcome.append(None)

    thread = threading.Thread(target=send)
    thread.start()
    per.wait_for_requests(1)
    per.release()
    thread.join(5)
    assert outcome == [True if accept else None]
    assert per.accepted == accept


def test_a_hang_may_end_by_itself(per, client):
    """After its seconds the answer comes."""
    per.set_fault(Hang(0.05, accept=True))
    assert _get(per, client).json()["ok"] is True


# --- Which request meets which fault ----------------------------------------------------------------------


def test_a_fault_ends_after_its_times(per, add):
    """The next requests meet it, those after them do not."""
    per.set_fault(Status(500), times=2)
    assert [add().status_code for _ in range(4)] == [500, 500, 200, 200]
    assert per.requests == 4


def test_counted_faults_follow_each_other_and_precede_the_standing_one(per, add):
    """They are met in the order in which they were set."""
    per.set_fault(Status(500))
    per.set_fault(Status(501), times=1)
    per.set_fault(Status(502), times=2)
    assert [add().status_code for _ in range(5)] == [501, 502, 502, 500, 500]


def test_a_standing_fault_replaces_the_former(per, add):
    """An endpoint has one of them, until faults are cleared."""
    per.set_fault(Status(500))
    per.set_fault(Status(501))
    assert add().status_code == 501
    per.clear_faults()
    assert add().status_code == 200


def test_a_poison_activity_is_picked_by_its_parameters(per, add):
    """Only the activity that matches meets the fault."""
    per.set_fault(Refuse("poison"), when=lambda activity: activity.user_id == "BAD")
    assert add(user="GOOD").json()["ok"] is True
    assert add(user="BAD").json() == {"ok": False, "message": "poison"}
    assert [activity.user_id for activity in per.activities] == ["GOOD"]


def test_a_fault_belongs_to_its_endpoint(per, add, report):
    """Reports meet only faults that are set for them."""
    per.set_fault(Status(500))
    assert report().status_code == 200
    per.set_fault(Status(501), endpoint="reports.get")
    assert (add().status_code, report().status_code) == (500, 501)
    per.set_fault(Status(502), endpoint="both")
    assert (add().status_code, report().status_code) == (502, 502)


def test_a_rate_limit_lets_through_what_it_allows(per, add):
    """The burst passes, what comes beyond it gets 429 and the seconds to wait; it is not counted."""
    per.set_fault(RateLimit(per_second=0.001, burst=3))
    answers = [add() for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert 990 < int(answers[-1].headers["Retry-After"]) <= 1000
    assert per.accepted == 3


def test_a_rate_limit_refills(per, add):
    """Who waits is served again."""
    per.set_fault(RateLimit(per_second=50, burst=1, retry_after=False))
    deadline = time.monotonic() + 5
    while per.accepted < 3 and time.monotonic() < deadline:
        add()
    assert per.accepted == 3
    assert "rate_limited" in {seen.fault for seen in per.request_log}


@pytest.mark.parametrize(
    "wrong",
    [
        {"fault": Status(500), "times": 0},
        {"fault": Status(500), "endpoint": "activities"},
        {"fault": Status(500), "endpoint": "both", "when": lambda _: True},
    ],
)
def test_a_fault_that_could_never_be_met_is_refused(per, wrong):
    """A mistake shows when the fault is set, not when a test waits for it."""
    with pytest.raises(ValueError):
        per.set_fault(**wrong)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Status, {"code": 700}),
        (Latency, {"seconds": -1}),
        (RateLimit, {"per_second": 0}),
        (RateLimit, {"per_second": 1, "burst": 0}),
        (HugeBody, {"size": -1}),
    ],
)
def test_a_fault_that_no_server_could_have_is_refused(kind, options):
    """Statuses, seconds, sizes and rates are checked."""
    with pytest.raises(ValueError):
        kind(**options)


# --- Helpers ---------------------------------------------------------------------------------------------


def _get(per, client, **options):
    url = f"{per.url}/activities.add?billingId=b&userId=u&activityTypeId=t"
    return client.get(url, headers={"Authorization": f"Bearer {per.activity_token}"}, **options)


def _raw_request(per):
    port = urlsplit(per.url).port
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    connection.sendall(
        b"GET /activities.add?billingId=b&userId=u&activityTypeId=t HTTP/1.1\r\nHost: per\r\n"
        b"Authorization: Bearer %b\r\n\r\n" % per.activity_token.encode()
    )
    return connection


def _read_to_end(connection):
    return b"".join(iter(lambda: connection.recv(65_536), b""))
