from datetime import UTC, datetime, timedelta

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perqueue.sandbox import Sandbox

BAD_TOKEN = {"ok": False, "message": "invalid_auth_token"}


def test_an_activity_is_accepted_with_a_transaction_id(per, add):
    """A valid request gets the documented success, and stands in the ledger as it was sent."""
    answer = add("GROUP_A", "USER_1")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    (activity,) = per.activities
    assert answer.json() == {"ok": True, "result": {"transactionId": activity.transaction_id}}
    assert (activity.billing_id, activity.user_id) == ("GROUP_A", "USER_1")
    assert activity.activity_type_id == per.activity_type_id
    assert activity.received_at.tzinfo is UTC


def test_every_repeat_counts_as_an_activity_but_users_are_unique(per, add):
    """A repeat gets a transaction ID of its own, and changes no count of unique users."""
    ids = {add(user=user).json()["result"]["transactionId"] for user in ("A", "B", "A")}
    assert len(ids) == len(per.activities) == per.accepted == 3
    assert per.unique("GROUP_A") == 2
    assert per.unique("GROUP_B") == 0


def test_transaction_ids_are_never_given_twice_even_after_a_reset(per, add):
    """Forgetting everything does not forget which transaction IDs were given."""
    before = add().json()["result"]["transactionId"]
    per.reset()
    assert add().json()["result"]["transactionId"] != before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_any_text_survives_the_query_string(per, add, text):
    """What a client encodes is what the ledger holds, character for character."""
    assert add(billing=text, user=text).json()["ok"] is True
    assert (per.activities[-1].billing_id, per.activities[-1].user_id) == (text, text)


@pytest.mark.parametrize(
    ("raw", "meant"), [("a+b", "a b"), ("a%20b", "a b"), ("a%2Bb", "a+b"), ("%E6%97%A5", "日")]
)
def test_both_encodings_of_a_space_are_understood(per, client, raw, meant):
    """A plus sign is a space, as in forms; a real plus sign arrives as %2B."""
    headers = {"Authorization": f"Bearer {per.activity_token}"}
    client.get(f"{per.url}/activities.add?billingId={raw}&userId=u&activityTypeId=t", headers=headers)
    assert per.activities[0].billing_id == meant


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("userId=u&activityTypeId=t", "invalid_billing_id"),
        ("billingId=&userId=u&activityTypeId=t", "invalid_billing_id"),
        ("billingId=b&billingId=b&userId=u&activityTypeId=t", "invalid_billing_id"),
        ("billingid=b&userId=u&activityTypeId=t", "invalid_billing_id"),
        ("billingId=b&activityTypeId=t", "invalid_user_id"),
        ("billingId=b&userId=u", "invalid_activity_type_id"),
        ("billingId=%FF&userId=u&activityTypeId=t", "invalid_query"),
        ("", "invalid_billing_id"),
    ],
)
def test_parameters_must_be_there_exactly_once_and_not_blank(per, client, query, reason):
    """Anything else is refused with status 200 and a reason, and is not counted."""
    headers = {"Authorization": f"Bearer {per.activity_token}"}
    answer = client.get(f"{per.url}/activities.add?{query}", headers=headers)
    assert (answer.status_code, answer.json()) == (200, {"ok": False, "message": reason})
    assert per.activities == ()
    assert per.requests == 1


def test_unknown_parameters_are_ignored(per, client):
    """A parameter that Per does not know changes nothing."""
    headers = {"Authorization": f"Bearer {per.activity_token}"}
    url = f"{per.url}/activities.add?billingId=b&userId=u&activityTypeId=t&when=now"
    assert client.get(url, headers=headers).json()["ok"] is True


@pytest.mark.parametrize(
    "header",
    [
        None,
        "Bearer",
        "Bearer nobody",
        "Basic sandbox-activity-token",
        "Bearer sandbox-reporting-token",
    ],
)
def test_a_missing_unknown_or_unscoped_token_is_refused(per, client, header):
    """Without a token for activities the answer is the documented 401."""
    headers = {} if header is None else {"Authorization": header}
    url = f"{per.url}/activities.add?billingId=b&userId=u&activityTypeId=t"
    answer = client.get(url, headers=headers)
    assert (answer.status_code, answer.json()) == (401, BAD_TOKEN)
    assert per.activities == ()


def test_a_bad_token_can_become_good(per, add):
    """Tokens are replaced at run time, and the sandbox's own token stays known."""
    per.set_tokens({"other": {"activity", "reporting"}})
    assert add().status_code == 401
    per.set_tokens({per.activity_token: "activity"})
    assert add().status_code == 200
    assert per.tokens == {per.activity_token: frozenset({"activity"})}
    with pytest.raises(ValueError, match="unknown scopes"):
        per.set_tokens({"t": {"admin"}})


def test_activity_types_can_be_restricted(client):
    """Given a list of activity types, any other is refused."""
    with Sandbox(activity_types=["known"]) as per:
        headers = {"Authorization": f"Bearer {per.activity_token}"}
        url = f"{per.url}/activities.add?billingId=b&userId=u&activityTypeId="
        assert per.activity_type_id == "known"
        assert client.get(f"{url}known", headers=headers).json()["ok"] is True
        answer = client.get(f"{url}other", headers=headers)
        assert answer.json() == {"ok": False, "message": "invalid_activity_type_id"}


def test_other_paths_and_methods_are_refused(per, client):
    """Only GET on the two endpoints is the API."""
    assert client.get(f"{per.url}/activities.remove").status_code == 404
    assert client.get(f"{per.url}/").json() == {"ok": False, "message": "not_found"}
    assert client.get(f"{per.url}/_sandbox/nothing").status_code == 404
    assert per.requests == 0
    assert client.post(f"{per.url}/activities.add").status_code == 405
    assert per.requests == 1


def test_the_request_log_shows_what_was_sent(per, add):
    """Headers and parameters of each request can be looked at; the repr does not show the token."""
    add("GROUP & CO", "USER_1")
    (seen,) = per.request_log
    assert (seen.method, seen.path, seen.fault, seen.accepted) == ("GET", "/activities.add", None, True)
    assert seen.headers["authorization"] == f"Bearer {per.activity_token}"
    assert seen.parameters["billingId"] == "GROUP & CO"
    assert "billingId=GROUP" in seen.query
    assert per.activity_token not in repr(seen)


# --- Reports -----------------------------------------------------------------------------------------


def test_a_report_counts_unique_users_by_type_and_billing_id(per, add, report):
    """The answer has the documented shape, and each type and billing ID a count of its own."""
    for billing, user, kind in [
        ("A", "1", "t"),
        ("A", "2", "t"),
        ("A", "1", "t"),
        ("B", "1", "t"),
        ("A", "9", "x"),
    ]:
        add(billing, user, kind)
    result = report(start="2018-12-01T00:00:00Z").json()["result"]
    assert result == {
        "start": "2018-12-01T00:00:00.000Z",
        "end": None,
        "activityTypes": {
            "t": {"billingIds": {"A": {"unique": 2}, "B": {"unique": 1}}},
            "x": {"billingIds": {"A": {"unique": 1}}},
        },
    }
    assert per.unique("A") == 3
    assert per.unique("A", "t") == 2
    assert per.unique("A", "unknown") == 0


def test_without_a_period_a_report_covers_the_prior_calendar_month(add, report, clock):
    """Its first and its last moment are inside, their neighbours are not."""
    first = datetime(2018, 12, 1, tzinfo=UTC)
    last = datetime(2018, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)
    clock.now = first - timedelta(microseconds=1)
    add(user="before", kind="t")
    clock.now = first
    add(user="first", kind="t")
    clock.now = last
    add(user="last", kind="t")
    clock.now = last + timedelta(microseconds=1)
    add(user="after", kind="t")
    clock.now = datetime(2019, 1, 31, 12, tzinfo=UTC)
    assert report().json()["result"] == {
        "start": "2018-12-01T00:00:00.000Z",
        "end": "2018-12-31T23:59:59.999Z",
        "activityTypes": {"t": {"billingIds": {"GROUP_A": {"unique": 2}}}},
    }


def test_both_ends_of_a_period_are_included(per, add, report, clock):
    """Milliseconds are optional in a request, and always there in the answer."""
    noon = datetime(2018, 12, 15, 12, tzinfo=UTC)
    clock.now = noon
    add(user="A", kind="t")
    clock.now = noon + timedelta(seconds=1)
    add(user="B", kind="t")
    answer = report(start="2018-12-15T12:00:00Z", end="2018-12-15T12:00:01.000Z").json()
    assert answer["result"]["activityTypes"]["t"]["billingIds"]["GROUP_A"] == {"unique": 2}
    assert answer["result"]["end"] == "2018-12-15T12:00:01.000Z"
    answer = report(start="2018-12-15T12:00:00.001Z", end="2018-12-15T12:00:00.999Z").json()
    assert answer["result"]["activityTypes"] == {}
    assert per.unique("GROUP_A", start=noon, end=noon) == 1
    with pytest.raises(ValueError, match="aware"):
        per.unique("GROUP_A", start=noon.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"end": "2018-12-15T12:00:00Z"}, "missing_start"),
        ({"start": "yesterday"}, "invalid_start"),
        ({"start": "2018-13-15T12:00:00Z"}, "invalid_start"),
        ({"start": ["2018-12-15T12:00:00Z", "2018-12-15T12:00:00Z"]}, "invalid_start"),
        ({"start": "2018-12-15T12:00:00Z", "end": "2018-12-15"}, "invalid_end"),
        ({"start": "2018-12-15T12:00:00.123456Z"}, "invalid_start"),
    ],
)
def test_a_period_that_makes_no_sense_is_refused(report, params, reason):
    """An end needs a start, and both are timestamps as Per writes them."""
    answer = report(**params)
    assert (answer.status_code, answer.json()) == (200, {"ok": False, "message": reason})


def test_blank_and_unknown_parameters_of_a_report_are_ignored(report):
    """A blank start is no start."""
    assert report(start="", end="", format="csv").json()["ok"] is True


def test_reports_need_a_token_for_reporting(per, report):
    """A token for activities reads no report."""
    answer = report(token=per.activity_token)
    assert (answer.status_code, answer.json()) == (401, BAD_TOKEN)
    raw = httpx.get(
        f"{per.url}/reports.get?start=%FF", headers={"Authorization": f"Bearer {per.reporting_token}"}
    )
    assert raw.json() == {"ok": False, "message": "invalid_query"}
