import httpx
import pytest

from perqueue.sandbox import Hang, Status, describe_faults, make_fault


def test_the_state_shows_counts_and_faults(per, add, client):
    """Counts and the faults in force, in the order in which they are tried."""
    per.set_fault(Status(503), times=3)
    add()
    state = client.get(f"{per.url}/_sandbox/state").json()
    assert (state["url"], state["requests"], state["accepted"]) == (per.url, 1, 0)
    (fault,) = state["faults"]
    assert (fault["name"], fault["times"], fault["served"]) == ("status", 2, 1)
    assert fault["parameters"]["code"] == 503
    assert fault["endpoints"] == ["activities.add"]


def test_the_activities_can_be_fetched(per, add, client):
    """Each with its transaction ID and its arrival."""
    add("GROUP_日本", "USER_1")
    (activity,) = client.get(f"{per.url}/_sandbox/activities").json()
    assert activity["billing_id"] == "GROUP_日本"
    assert activity["transaction_id"] == per.activities[0].transaction_id
    assert activity["received_at"].endswith("Z")


def test_a_fault_can_be_set_and_ended_from_afar(per, add, client):
    """PUT puts it in force, DELETE ends it."""
    url = f"{per.url}/_sandbox/fault"
    assert client.put(url, json={"name": "status", "code": 502}).json() == {"ok": True}
    assert add().status_code == 502
    assert client.delete(url).json() == {"ok": True}
    assert add().status_code == 200
    wish = {"name": "refuse", "reason": "poison", "when": {"user_id": "BAD"}, "times": 1}
    assert client.put(url, json=wish).json() == {"ok": True}
    assert add(user="GOOD").json()["ok"] is True
    assert add(user="BAD").json()["message"] == "poison"
    assert add(user="BAD").json()["ok"] is True
    client.put(url, json={"name": "status", "endpoint": "both"})
    assert client.get(f"{per.url}/reports.get").status_code == 500


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        ([], "JSON object with a name"),
        ({"name": "nothing"}, "no fault is called 'nothing'"),
        ({"name": "status", "color": "red"}, "no parameter 'color'"),
        ({"name": "status", "code": "500"}, "code cannot be '500'"),
        ({"name": "status", "code": True}, "code cannot be True"),
        ({"name": "status", "code": 99}, "must be an HTTP status"),
        ({"name": "latency", "seconds": "long"}, "seconds cannot be 'long'"),
        ({"name": "refuse", "key": "reason"}, "key cannot be 'reason'"),
        ({"name": "rate_limit"}, "per_second"),
        ({"name": "status", "times": 0}, "times must be at least 1"),
        ({"name": "status", "times": "1"}, "times must be a whole number"),
        ({"name": "status", "endpoint": "x"}, "endpoint must be one of"),
        ({"name": "status", "endpoint": []}, "endpoint must be one of the API"),
        ({"name": "status", "when": {"age": "7"}}, "when must be an object"),
    ],
)
def test_a_wish_that_makes_no_sense_is_explained(per, client, wish, text):
    """The answer is 400 with the reason, and no fault is in force."""
    answer = client.put(f"{per.url}/_sandbox/fault", json=wish)
    assert answer.status_code == 400
    assert text in answer.json()["message"]
    assert client.get(f"{per.url}/_sandbox/state").json()["faults"] == []


def test_what_is_not_json_is_refused(per, client):
    """A body that is no JSON is a 400 as well."""
    assert client.put(f"{per.url}/_sandbox/fault", content=b"{").status_code == 400


def test_a_reset_and_a_release_from_afar(per, add, client):
    """Both do what their methods do."""
    add()
    per.set_fault(Hang())
    assert client.post(f"{per.url}/_sandbox/release").json() == {"ok": True}
    assert client.post(f"{per.url}/_sandbox/reset").json() == {"ok": True}
    assert (per.accepted, per.requests) == (0, 0)
    assert add().status_code == 200


def test_the_remote_control_counts_as_no_request(per):
    """Only the API's own endpoints count."""
    httpx.get(f"{per.url}/_sandbox/state", trust_env=False)
    assert per.requests == 0


def test_every_fault_is_described():
    """Each has a name, a summary on one line, and parameters that make one."""
    descriptions = describe_faults()
    names = [description.name for description in descriptions]
    assert names == sorted(names)
    assert {"status", "rate_limit", "reset_after_accepting", "half_body", "hang", "drip"} <= set(names)
    for description in descriptions:
        assert description.summary.endswith((".", "…"))
        required = {"per_second": 5} if description.name == "rate_limit" else {}
        assert make_fault(description.name, required).name == description.name
    by_name = {description.name: description.parameters for description in descriptions}
    assert by_name["latency"] == "seconds=1.0"
    assert by_name["rate_limit"] == "per_second, burst=None, retry_after=True"
