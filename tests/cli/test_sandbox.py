import signal

import httpx
import pytest


@pytest.fixture
def sandbox(start):
    """Start `perqueue sandbox`, and return it with the variables that it prints."""

    def run(*arguments):
        program = start("sandbox", "--port", "0", *arguments)
        exported = {}
        while len(exported) < 4:
            line = program.out.next(20)
            assert line is not None, program.err.rest()
            if line.startswith("  export "):
                name, _, value = line.removeprefix("  export ").partition("=")
                exported[name] = value
        return program, exported

    return run


def test_it_prints_what_a_program_needs(sandbox, start, tmp_path):
    """`sandbox` prints the variables with which the other commands work, and shows what arrives."""
    program, exported = sandbox()
    exported["PERQUEUE_OUTBOX"] = str(tmp_path / "other.db")
    assert start("record", "GROUP_A", "USER_1", **exported).wait()[0] == 0
    assert start("drain", **exported).wait()[0] == 0
    code, out, _ = start("report", "--last", "1h", "--csv", **exported).wait()
    assert (code, out[1:]) == (0, ["sandbox-activity-type,GROUP_A,1"])
    program.process.send_signal(signal.SIGINT)
    code, out, err = program.wait()
    assert (code, err) == (0, [])
    seen = [line.split()[1:] for line in out if "activities.add" in line or "reports.get" in line]
    assert seen[0] == ["accepted", "activities.add", "GROUP_A", "USER_1", "sandbox-activity-type"]
    assert seen[1][:2] == ["answered", "reports.get"]
    assert out[-1] == "2 requests, 1 activity accepted"


def test_faults_on_demand(sandbox):
    """`--fault` sets a fault with its parameters, for as many requests as it says."""
    program, exported = sandbox("--fault", "status:code=503,times=1,body=later")
    url = exported["PER_BASE_URL"] + "/activities.add"
    headers = {"Authorization": f"Bearer {exported['PER_ACTIVITY_TOKEN']}"}
    query = {"billingId": "GROUP_A", "userId": "USER_1", "activityTypeId": "TYPE"}
    with httpx.Client(trust_env=False, headers=headers) as client:
        answers = [client.get(url, params=query) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 200]
    assert answers[0].text == "later"
    program.process.terminate()
    code, out, _ = program.wait()
    assert code == 0
    assert any("(status)" in line for line in out)


def test_a_flood_is_summed_up(sandbox):
    """`sandbox` prints some of many requests, and says how many more there were."""
    program, exported = sandbox()
    with httpx.Client(trust_env=False) as client:
        for _ in range(60):
            client.get(exported["PER_BASE_URL"] + "/reports.get")
    program.process.terminate()
    code, out, _ = program.wait()
    assert code == 0
    lines = [line for line in out if "reports.get" in line]
    more = [int(line.split()[1]) for line in out if " more, 0 of them accepted" in line]
    assert len(lines) + sum(more) == 60


def test_a_port_that_is_taken(perqueue, per):
    """A taken port is one line and exit code 2, with the way out."""
    port = per.url.rpartition(":")[2]
    result = perqueue("sandbox", "--port", port)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "--port 0" in result.stderr


def test_the_faults_are_listed(perqueue):
    """`--list-faults` shows each fault with its parameters and what it does."""
    output = perqueue("sandbox", "--list-faults").output
    assert "rate_limit:  per_second" in output
    assert "A TCP reset" in output
