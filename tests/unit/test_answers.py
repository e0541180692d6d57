import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perqueue._activity import Verdict
from perqueue._answers import interpret, parse_json, presentable, retry_after

NOW = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)
OK = b'{"ok": true, "result": {"transactionId": "35434hjgghf46h34jh"}}'
HTML = b"<!DOCTYPE html><html><body><h1>Sign in to the network</h1></body></html>"
BAD_TOKEN = b'{"ok": false, "message": "invalid_auth_token"}'
UNANSWERED = (Verdict.NO_ANSWER, Verdict.RATE_LIMITED)


def no(reason, key="message"):
    return json.dumps({"ok": False, key: reason}).encode()


def meaning(status, body, **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return interpret(status, httpx.Headers(named), body, NOW.timestamp())


# --- The table of PER_API.md, row by row ---


@pytest.mark.parametrize("status", [200, 201, 202, 206, 299])
@pytest.mark.parametrize(
    ("body", "transaction_id"),
    [
        (OK, "35434hjgghf46h34jh"),
        (b'{"ok": true, "result": {"id": "t1"}}', "t1"),
        (b'{"ok": true, "result": {"transactionId": "t1", "id": "t2"}}', "t1"),
        (b'{"ok": true, "result": {"transactionId": null, "id": "t2"}}', "t2"),
        (b'{"ok": true, "result": {"transactionId": 12345}}', "12345"),
        (b'{"ok": true, "result": {"transactionId": " a\\tb\\u0000\\u200b "}}', " a\tb\0\u200b "),
        (b'{"ok": true, "result": {"transactionId": "%s"}}' % (b"x" * 5000), "x" * 5000),
        (b'{"ok": true, "result": {"transactionId": "a\\ud800b"}}', "a?b"),
        (b'{"ok": true, "error": null, "result": {"transactionId": "t1"}}', "t1"),
        (b'  {"ok": true, "result": {"transactionId": "t1"}}' + b" " * 5000, "t1"),
        (b'\xef\xbb\xbf{"ok": true, "result": {"transactionId": "t1"}}', "t1"),
    ],
)
def test_ok_with_a_transaction_id_is_accepted(status, body, transaction_id):
    """`ok: true` with a transaction ID, any 2xx, is accepted, as `transactionId` or as `id`, and the ID is
    kept exactly as Per sent it (invariant 2).
    """
    outcome = meaning(status, body)
    assert outcome.verdict is Verdict.ACCEPTED
    assert outcome.transaction_id == transaction_id
    assert outcome.reason is None


@pytest.mark.parametrize(
    ("status", "body"),
    [
        *[
            (status, body)
            for status in (401, 403)
            for body in (BAD_TOKEN, HTML, b"", OK, no("no such scope"))
        ],
        *[(status, BAD_TOKEN) for status in (200, 202, 302, 400, 404, 429, 500, 503)],
        (200, no("invalid_auth_token", "error")),
        (200, b'{"ok": false, "message": "Invalid credentials", "error": "invalid_auth_token"}'),
        (400, b'{"ok": false, "message": "invalid_auth_token", "error": "Unauthorized"}'),
        (200, b'{"ok": false, "message": "", "error": "invalid_auth_token"}'),
    ],
)
def test_a_bad_token_is_not_the_activitys_fault(status, body):
    """401 or 403, or `invalid_auth_token` with any status, is about the token (invariant 7)."""
    outcome = meaning(status, body)
    assert outcome.verdict is Verdict.BAD_TOKEN
    assert outcome.reason


@pytest.mark.parametrize("body", [HTML, b"", OK, no("internal"), no("no such group")])
@pytest.mark.parametrize("status", [408, 425, 429, 500, 501, 502, 503, 504, 507, 599])
def test_a_status_that_says_later_is_not_an_answer(status, body):
    """408, 425, 429 and any 5xx, with or without JSON, leave the activity pending (invariant 2)."""
    outcome = meaning(status, body)
    assert outcome.verdict in UNANSWERED
    assert (outcome.verdict is Verdict.RATE_LIMITED) == (status == 429)
    assert str(status) in outcome.reason


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_counts_with_429_and_503(status):
    """429 and 503 with `Retry-After` ask for that wait (invariant 6)."""
    outcome = meaning(status, HTML, retry_after="7")
    assert (outcome.verdict, outcome.retry_after) == (Verdict.RATE_LIMITED, 7.0)


@pytest.mark.parametrize("status", [200, 400, 404, 500, 302])
def test_retry_after_means_nothing_elsewhere(status):
    """`Retry-After` with any other status is no reason to wait."""
    assert meaning(status, HTML, retry_after="7").retry_after is None


@pytest.mark.parametrize("status", [200, 400, 409])
@pytest.mark.parametrize("key", ["message", "error"])
@pytest.mark.parametrize(
    "reason",
    [
        "rate_limited",
        "Rate limit exceeded",
        "rateLimitExceeded",
        "RATE-LIMIT",
        "too many requests",
        "too_many_requests",
        "throttled",
        "quota limit reached",
        "timeout",
        "database time_out",
        "The request timed out",
        "requestTimeout",
        "DBTimeout",
        "dbtimeout",
        "GatewayTimeout504",
        "rateLimited",
        "HTTPRateLimit",
        "serviceUnavailable",
        "APIUnavailable",
        "Err500Internal",
        "pleaseTryAgain",
        "service_unavailable",
        "temporarilyUnavailable",
        "internal_error",
        "InternalServerError",
        "scheduled maintenance",
        "please try again",
        "try_again_later",
        "retry",
    ],
)
def test_a_passing_fault_in_words_is_not_an_answer(status, key, reason):
    """`ok: false` that speaks of limits or of a passing fault leaves the activity pending (invariant 2)."""
    outcome = meaning(status, no(reason, key))
    assert outcome.verdict in UNANSWERED
    assert outcome.reason == reason


def test_a_passing_fault_in_either_field_is_not_an_answer():
    """What is said for people in `message` may be said for programs in `error`: both are read."""
    outcome = meaning(200, b'{"ok": false, "message": "Please slow down", "error": "rate_limited"}')
    assert (outcome.verdict, outcome.reason) == (Verdict.NO_ANSWER, "Please slow down")


@pytest.mark.parametrize("status", [200, 202, 400, 404, 409, 413, 422, 451])
@pytest.mark.parametrize("key", ["message", "error"])
@pytest.mark.parametrize(
    "reason",
    [
        "invalid_activity_type_id",
        "unknown billing ID",
        "no",
        "corporate account",
        "migration",
        "日本",
        "corporateAccount",
        "unlimitedPlanNeeded",
        "internationalUsersOnly",
        "INVALIDGroup",
        "lifetime_output",
    ],
)
def test_any_other_no_of_pers_is_a_rejection(status, key, reason):
    """Any other JSON with `ok: false`, 200 or 4xx, is rejected with Per's reason."""
    outcome = meaning(status, no(reason, key))
    assert outcome.verdict is Verdict.REJECTED
    assert outcome.reason == reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"ok": false}', "no reason given"),
        (b'{"ok": false, "message": null}', "no reason given"),
        (b'{"ok": false, "message": ""}', "no reason given"),
        (b'{"ok": false, "message": "   "}', "no reason given"),
        (b'{"ok": false, "message": null, "error": "no such group"}', "no such group"),
        (b'{"ok": false, "message": "a", "error": "b"}', "a"),
        (b'{"ok": false, "message": {"code": 7}}', '{"code": 7}'),
        (b'{"ok": false, "message": 7}', "7"),
        (b'{"ok": false, "message": "two\\nlines\\u0000"}', "two lines"),
        (b'{"ok": false, "message": "\\ud800"}', "?"),
    ],
)
def test_a_rejection_always_has_a_presentable_reason(body, reason):
    """The reason comes from `message`, else from `error`, on one line of valid Unicode."""
    outcome = meaning(200, body)
    assert (outcome.verdict, outcome.reason) == (Verdict.REJECTED, reason)


NOT_PERS = [
    HTML,
    b"",
    b" ",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'"ok"',
    b"1" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"\xff\xfe\x00",
    OK[: len(OK) // 2],
    OK[:-1],
    OK + b"}",
    b'{"ok": true}',
    b'{"ok": true, "result": null}',
    b'{"ok": true, "result": []}',
    b'{"ok": true, "result": "35434hjgghf46h34jh"}',
    b'{"ok": true, "result": {}}',
    b'{"ok": true, "result": {"transactionId": null}}',
    b'{"ok": true, "result": {"transactionId": ""}}',
    b'{"ok": true, "result": {"transactionId": " "}}',
    b'{"ok": true, "result": {"transactionId": true}}',
    b'{"ok": true, "result": {"transactionId": []}}',
    b'{"ok": true, "transactionId": "t1"}',
    b'{"ok": "true", "result": {"transactionId": "t1"}}',
    b'{"ok": 1, "result": {"transactionId": "t1"}}',
    b'{"ok": null, "message": "no such group"}',
    b'{"ok": "false", "message": "no such group"}',
    b'{"ok": 0, "message": "no such group"}',
    b'{"message": "no such group"}',
]


@pytest.mark.parametrize("status", [200, 201, 204, 400, 404, 413])
@pytest.mark.parametrize("body", NOT_PERS, ids=range(len(NOT_PERS)))
def test_what_is_not_pers_json_is_not_an_answer(status, body):
    """HTML, half a body, `ok: true` without a result: the activity stays pending (invariant 2)."""
    assert meaning(status, body).verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize(
    "status", [100, 101, 103, 199, 300, 301, 302, 303, 304, 307, 308, 399, 600, 999, 0, -1]
)
@pytest.mark.parametrize("body", [OK, no("no such group"), HTML])
def test_a_redirect_or_an_unknown_status_is_not_an_answer(status, body):
    """Anything outside 2xx and 4xx, whatever it says, leaves the activity pending (invariant 2)."""
    assert meaning(status, body).verdict is Verdict.NO_ANSWER


@pytest.mark.parametrize("status", [400, 404, 410, 413])
def test_ok_with_an_error_status_is_not_accepted(status):
    """A body that says yes under a status that says no is not Per's."""
    assert meaning(status, OK).verdict is Verdict.NO_ANSWER


# --- For everything that HTTP can bring ---

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
nearly_pers = st.fixed_dictionaries(
    {},
    optional={
        "ok": st.booleans() | anything,
        "message": st.sampled_from(["invalid_auth_token", "rate_limited", "x" * 600, "no\ud800"]) | anything,
        "error": st.text() | anything,
        "result": st.fixed_dictionaries({}, optional={"transactionId": st.text() | anything, "id": anything})
        | anything,
    },
)
bodies = (
    st.binary()
    | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))
    | nearly_pers.map(lambda value: json.dumps(value).encode())
    | nearly_pers.flatmap(
        lambda value: st.integers(0, 40).map(lambda size: json.dumps(value).encode()[:size])
    )
)
statuses = st.sampled_from([200, 400, 401, 429, 500, 503]) | st.integers(100, 599) | st.integers()
header_values = st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0")) | st.sampled_from(
    ["5", "-5", "1e9", "inf", "Thu, 29 Feb 2024 12:00:07 GMT", "Thu, 99 Xyz 2024 12:00:07 GMT"]
)


@given(status=statuses, body=bodies, after=header_values, date=header_values)
@example(status=500, body=no("x" * 600), after="", date="")
@example(status=429, body=no("x" * 500), after="1", date="")
def test_every_answer_means_exactly_one_thing(status, body, after, date):
    """The map is total: any status with any body never raises,
    and gives one consistent outcome (invariant 2).
    """
    headers = httpx.Headers({"retry-after": after.encode("latin-1"), "date": date.encode("latin-1")})
    outcome = interpret(status, headers, body, NOW.timestamp())
    answer = parse_json(body)
    accepted = outcome.verdict is Verdict.ACCEPTED
    assert outcome.verdict in Verdict
    assert outcome.status == status
    assert accepted == (outcome.transaction_id is not None)
    assert accepted == (outcome.reason is None)
    if accepted:
        assert 200 <= status < 300
        assert answer["ok"] is True
        assert outcome.transaction_id.strip()
    else:
        assert 0 < len(outcome.reason) <= 500
        assert outcome.reason.isprintable()
        outcome.reason.encode()
    if outcome.verdict is Verdict.REJECTED:
        assert answer["ok"] is False
        assert 200 <= status < 300 or 400 <= status < 500
        assert status not in (401, 403, 408, 425, 429)
    if outcome.retry_after is not None:
        assert outcome.verdict is Verdict.RATE_LIMITED
        assert outcome.retry_after > 0


@given(status=statuses, body=bodies)
def test_nothing_without_an_ok_of_pers_is_ever_accepted(status, body):
    """`ok: true` without a transaction ID, whatever else is in the answer, is never accepted."""
    answer = parse_json(body)
    result = answer.get("result") if answer else None
    has_id = isinstance(result, dict) and (result.get("transactionId") or result.get("id"))
    if not (answer and answer.get("ok") is True and (has_id or has_id == 0)):
        assert interpret(status, {}, body, 0.0).verdict is not Verdict.ACCEPTED


@given(st.text(max_size=2000))
def test_a_foreign_text_is_made_presentable(text):
    """Whatever Per or a proxy wrote, what is stored is one line of valid Unicode, not endless."""
    shown = presentable(text)
    assert shown.isprintable()
    assert len(shown) <= 500
    assert shown.encode().decode() == shown


# --- Retry-After ---


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("1", 1.0), ("120", 120.0), (" 5 ", 5.0), ("1.5", 1.5), ("0005", 5.0), ("999999999", 999_999_999.0)],
)
def test_retry_after_in_seconds(value, seconds):
    """Seconds, also with a fraction, are what they say."""
    assert retry_after({"retry-after": value}, 0.0) == seconds


@pytest.mark.parametrize("value", ["99999999999", "1" * 400, "1" * 10_000])
def test_a_huge_retry_after_is_a_wait_all_the_same(value):
    """An endless wait is still a request to wait, which the pace then caps."""
    assert retry_after({"retry-after": value}, 0.0) >= 99_999_999_999


@pytest.mark.parametrize(
    "value",
    [
        "",
        "0",
        "-1",
        "-999999999999",
        "soon",
        "nan",
        "inf",
        "1e3",
        "0x10",
        "5 seconds",
        "soon, later",
        ",",
        "١٢",
        "5;6",
        "Thu",
        "Thu, 99 Xyz 2024 99:99:99 GMT",
        "Thu, 29 Feb 0000 12:00:00 GMT",
        "Fri, 31 Dec 99999 23:59:59 GMT",
        "Thu, 29 Feb 2024 12:00:00 +9999999",
    ],
)
def test_nonsense_in_retry_after_is_no_wait(value):
    """Zero, a negative number and nonsense ask for nothing, and break nothing."""
    assert retry_after({"retry-after": value}, NOW.timestamp()) is None


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("2, 2", 2.0),
        ("2,3", 3.0),
        ("7, soon", 7.0),
        ("Thu, 29 Feb 2024 12:00:30 GMT, 5", 30.0),
        ("5, Thursday, 29-Feb-24 12:00:30 GMT", 30.0),
        ("Thu, 29 Feb 2024 12:00:30 GMT, Thu, 29 Feb 2024 12:00:40 GMT", 40.0),
    ],
)
def test_of_several_retry_after_the_longest_counts(value, seconds):
    """A header that came twice, from Per and from a proxy before it, is still obeyed."""
    assert retry_after({"retry-after": value}, NOW.timestamp()) == seconds
    twice = httpx.Headers([("Retry-After", "2"), ("Retry-After", "2")])
    assert retry_after(twice, NOW.timestamp()) == 2.0


def test_no_retry_after_is_no_wait():
    """Without the header there is no wait."""
    assert retry_after({}, 0.0) is None


def test_a_date_counts_from_the_servers_own_clock():
    """A date is compared with the answer's `Date`, so that a wrong local clock changes nothing."""
    headers = {
        "retry-after": format_datetime(NOW + timedelta(seconds=90), usegmt=True),
        "date": format_datetime(NOW, usegmt=True),
    }
    for wrong in (0.0, NOW.timestamp() + 10**6):
        assert retry_after(headers, wrong) == 90.0


@pytest.mark.parametrize("date", [None, "nonsense", ""])
def test_a_date_counts_from_our_clock_without_the_servers(date):
    """Without a usable `Date`, the local clock has to do."""
    headers = {"retry-after": format_datetime(NOW + timedelta(seconds=90), usegmt=True)}
    if date is not None:
        headers["date"] = date
    assert retry_after(headers, NOW.timestamp()) == 90.0


@pytest.mark.parametrize("seconds", [0, -1, -(10**7)])
def test_a_date_in_the_past_is_no_wait(seconds):
    """A date that has come asks for nothing."""
    headers = {
        "retry-after": format_datetime(NOW + timedelta(seconds=seconds), usegmt=True),
        "date": format_datetime(NOW, usegmt=True),
    }
    assert retry_after(headers, 0.0) is None


@pytest.mark.parametrize(
    "value",
    ["Thursday, 29-Feb-24 12:00:30 GMT", "Thu Feb 29 12:00:30 2024", "Thu, 29 Feb 2024 13:00:30 +0100"],
)
def test_the_older_forms_of_a_date_are_understood(value):
    """RFC 850's and asctime's form, and another time zone, mean the same moment (RFC 9110, 5.6.7)."""
    assert retry_after({"retry-after": value}, NOW.timestamp()) == 30.0


@given(header_values, header_values, st.floats(0, 1e12))
def test_retry_after_is_a_positive_number_or_nothing(value, date, now):
    """Whatever the headers say, the wait is positive or there is none."""
    seconds = retry_after(
        httpx.Headers({"retry-after": value.encode("latin-1"), "date": date.encode("latin-1")}), now
    )
    assert seconds is None or seconds > 0
