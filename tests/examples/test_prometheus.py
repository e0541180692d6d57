"""The recipe for Prometheus and Grafana, with a real Prometheus that scrapes the example."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from perqueue.sandbox import BadToken, Refuse, Status
from tests.helpers import environment, free_port

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RULES = EXAMPLES / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((EXAMPLES / "grafana" / "perqueue.json").read_text(encoding="utf-8"))
PATIENCE = 30


def tool(name):
    """Return where a tool is; skip the test without it."""
    return shutil.which(name) or pytest.skip(f"needs {name}")


class Prometheus:
    """A Prometheus of the test's own, asked over its HTTP API."""

    def __init__(self, url):
        self._client = httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE)

    def get(self, path, **parameters):
        answer = self._client.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def is_ready(self):
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, expression):
        """Return the result of an expression: (labels, value) for each series."""
        return [
            (each["metric"], float(each["value"][1]))
            for each in self.get("/api/v1/query", query=expression)["result"]
        ]

    def value(self, expression):
        """Return the one value of an expression; None while there is none."""
        result = self.ask(expression)
        assert len(result) < 2, result
        return result[0][1] if result else None

    def close(self):
        self._client.close()


@pytest.fixture
def program(per, outbox):
    """The example, counting what is written to it: (process, port of its metrics)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PER_", "PERQUEUE_"))}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", EXAMPLES / "metrics_prometheus.py", "0"],
        env=clean | environment(outbox, per),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        yield process, int(re.search(r":(\d+)/metrics", said).group(1))
    finally:
        process.kill()
        process.wait(PATIENCE)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.fixture
def prometheus(tmp_path, program):
    """The example's own configuration, looking at the example each second."""
    server = tool("prometheus")
    config = yaml.safe_load((EXAMPLES / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{program[1]}"]
    path = tmp_path / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    with running(server, path, tmp_path) as url:
        prometheus = Prometheus(url)
        yield prometheus
        prometheus.close()


@contextmanager
def running(server, config, folder):
    port = free_port()
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                server,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            probe = Prometheus(url)
            deadline = time.monotonic() + PATIENCE
            while not probe.is_ready():
                assert process.poll() is None, (folder / "prometheus.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            probe.close()
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


def write(program, users):
    program[0].stdin.writelines(f"GROUP_A {user}\n" for user in users)
    program[0].stdin.flush()


def test_an_outage_as_prometheus_and_grafana_see_it(per, program, prometheus, until, outbox):
    """What Prometheus says is what the sandbox's ledger says; an outage comes, is seen, and goes."""
    ask = prometheus.value
    state = 'perqueue_drain_status{{perqueue_drain_state="{}"}}'.format

    write(program, (f"USER_{number}" for number in range(50)))
    per.wait_for(50, timeout=PATIENCE)
    until(lambda: ask("perqueue_outbox_delivered_total") == 50, PATIENCE)
    assert ask("perqueue_outbox_recorded_total") == 50
    until(lambda: ask("perqueue_record_duration_seconds_count") == 50, PATIENCE)
    until(lambda: ask('perqueue_drain_requests_total{perqueue_outcome="accepted"}') == per.accepted, PATIENCE)

    per.set_fault(Status(503))
    write(program, (f"LATE_{number}" for number in range(20)))
    until(lambda: ask("perqueue_outbox_pending") == 20 and ask(state("backing_off")) == 1, PATIENCE)
    until(lambda: (ask("perqueue_outbox_oldest_age_seconds") or 0) > 1, PATIENCE)
    age = ask("perqueue_outbox_oldest_age_seconds")
    until(lambda: ask("perqueue_outbox_oldest_age_seconds") > age + 1, PATIENCE)
    assert ask('perqueue_drain_requests_total{error_type="http_5xx"}') >= 1

    per.clear_faults()
    per.set_fault(Refuse("no such user"), when=lambda activity: activity.user_id == "LATE_7")
    until(lambda: ask("perqueue_outbox_pending") == 0, PATIENCE)
    until(lambda: ask(state("idle")) == 1, PATIENCE)
    until(lambda: ask("perqueue_outbox_delivered_total") == per.accepted == 69, PATIENCE)
    assert ask("perqueue_outbox_rejected") == 1
    assert ask("perqueue_outbox_oldest_age_seconds") == 0
    assert ask("perqueue_outbox_size_bytes{perqueue_outbox_file='database'}") == outbox.stat().st_size

    until(lambda: "PerqueueRejected" in firing(prometheus), PATIENCE)
    for rule in rules(prometheus):
        assert rule["health"] == "ok", rule
    empty = [title for title, expr in panels() if not prometheus.ask(expr)]
    assert empty == []

    per.set_fault(BadToken())
    write(program, ["LAST"])
    until(lambda: ask(state("paused")) == 1, PATIENCE)
    (drain,) = {expr for title, expr in panels() if title == "Drain"}
    assert ask(drain) == 4
    per.clear_faults()
    _, errors = program[0].communicate(timeout=PATIENCE)
    assert program[0].returncode == 0, errors
    assert "Per refused 1 of the activities" in errors
    assert per.accepted == 70


def rules(prometheus):
    return [rule for group in prometheus.get("/api/v1/rules")["groups"] for rule in group["rules"]]


def firing(prometheus):
    return {rule["name"] for rule in rules(prometheus) if rule["state"] == "firing"}


def panels():
    """Return title and expression of all that the dashboard asks, as Grafana fills in its variables."""
    filled = {"$__rate_interval": "30s", "$outbox": ".*"}
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in filled.items():
                expr = expr.replace(name, value)
            assert "$" not in expr
            yield panel["title"], expr


def test_the_rules_are_valid_and_do_what_they_say():
    """Prometheus's own tool accepts the rules, and its unit tests of them pass."""
    promtool = tool("promtool")
    tests = RULES.with_name("alerts_test.yml")
    subprocess.run([promtool, "check", "config", RULES.with_name("prometheus.yml")], check=True)
    subprocess.run([promtool, "test", "rules", tests], check=True, timeout=60)
    tried = tests.read_text(encoding="utf-8")
    names = [
        rule["alert"] for rule in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"][0]["rules"]
    ]
    assert [name for name in names if tried.count(name) < 1] == []


def test_the_dashboard_can_be_imported():
    """Panels have IDs of their own and do not overlap, and the data source is the reader's choice."""
    boxes, ids = [], []
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        ids.append(panel["id"])
        assert panel["title"]
        assert panel["description"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        assert {panel["datasource"]["uid"], *(t["datasource"]["uid"] for t in panel["targets"])} == {
            "${datasource}"
        }
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        boxes += [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
    assert len(ids) == len(set(ids)) > 10
    assert len(boxes) == len(set(boxes))
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["outbox"]["allValue"] == ".*"
    assert "__inputs" not in DASHBOARD
