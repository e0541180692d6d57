"""Deployments of the drainer: unit and manifest are sound, and their commands do what they are for."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time

import pytest

from perqueue import AuthenticationError
from perqueue._lock import drain_lock
from perqueue.sandbox import Latency
from tests.faults._needs import needs
from tests.helpers import Child, users
from tests.recipes.conftest import EXAMPLES

UNIT = EXAMPLES / "deploy" / "perqueue-drain.service"
MANIFEST = EXAMPLES / "deploy" / "kubernetes.yaml"
TEXT = UNIT.read_text(encoding="utf-8")
BIN = sysconfig.get_path("scripts")


def settings(name):
    return re.findall(rf"^{name}=(.*)$", TEXT, re.MULTILINE)


@pytest.fixture
def verify(tmp_path):
    """Run systemd's checks on the unit, with a program that is there."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    [program] = [line.split()[0] for line in settings("ExecStart")]
    unit = tmp_path / UNIT.name

    def run(*arguments, text=TEXT):
        unit.write_text(text.replace(program, f"{BIN}/perqueue"), encoding="utf-8")
        command = ["systemd-analyze", *arguments, str(unit)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_unit_is_sound(verify):
    """The unit is what systemd understands, which would notice a mistyped setting."""
    assert verify("verify") == (0, "")
    wrong = TEXT.replace("Restart=always", "Restart=allways")
    assert "allways" in verify("verify", text=wrong)[1]


def test_unit_is_confined_as_the_recipe_says(verify):
    """The exposure level is below 2 of 10, and without its confinement it would not be."""
    code, output = verify("security", "--offline=true", "--threshold=20")
    assert code == 0, output
    bare = re.sub(r"^(Protect|Private|Restrict|System|NoNew|Capability).*$", "", TEXT, flags=re.MULTILINE)
    assert verify("security", "--offline=true", "--threshold=20", text=bare)[0] != 0


def test_unit_allows_what_the_drainer_does(per, env, make_queue, tmp_path):
    """No system call, socket or mapping of a delivery is one that the unit forbids."""
    for tool in ("strace", "systemd-analyze"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    make_queue(drain=False, activity_type_id="TYPE").record("ACME", "USER_1")
    trace = tmp_path / "trace"
    command = ["strace", "-f", "-qq", "-o", trace, f"{BIN}/perqueue", "drain"]
    subprocess.run(command, env=clean() | env, check=True, capture_output=True, timeout=60)
    assert users(per) == ["USER_1"]
    lines = [line.partition(" ")[2].strip() for line in trace.read_text(errors="replace").splitlines()]
    called = {match[1] for line in lines if (match := re.match(r"(\w+)\(", line))}
    allowed, *denied = settings("SystemCallFilter")
    assert not called - system_calls(allowed)
    forbidden = system_calls(*denied[0].removeprefix("~").split()) - {"fchown"}  # SQLite, as root alone
    assert {call for call in called & forbidden if not harmless(call, lines)} == set()
    families = {match[1] for line in lines if (match := re.match(r"socket\((AF_\w+)", line))}
    assert families
    assert families <= set(settings("RestrictAddressFamilies")[0].split())
    assert [line for line in lines if "PROT_WRITE|PROT_EXEC" in line] == []


def harmless(call, lines):
    """Tell whether a call only asks: prlimit64 without new limits, as the C library does."""
    made = [line for line in lines if line.startswith(f"{call}(")]
    return call == "prlimit64" and all("NULL, {" in line for line in made)


def system_calls(*groups):
    """Return what the groups of systemd's filter contain."""
    found = set()
    for group in groups:
        text = subprocess.check_output(["systemd-analyze", "syscall-filter", group], text=True)
        names = {line.strip() for line in text.splitlines()[1:] if not line.strip().startswith("#")} - {""}
        nested = {name for name in names if name.startswith("@")}
        found |= (names - nested) | (system_calls(*nested) if nested else set())
    return found


def clean():
    """Return this environment without settings of ours, and with the commands on the path."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PER")}
    return mine | {"PATH": f"{BIN}:{mine['PATH']}"}


def test_unit_ends_in_time_and_restarts_without_loss(per, env, make_queue):
    """The unit's command settles what is in flight at SIGTERM and exits with 0; after kill -9 it goes on."""
    [start] = settings("ExecStart")
    command = [f"{BIN}/perqueue", *shlex.split(start)[1:]]
    assert settings("KillSignal") == ["SIGTERM"]
    queue = make_queue(drain=False, activity_type_id="TYPE")
    per.set_fault(Latency(0.3))
    with run(command, env) as first:
        queue.record("ACME", "USER_1")
        per.wait_for(1)  # it counts at its arrival, and the answer is under way
        first.process.send_signal(signal.SIGTERM)
        assert first.wait(float(settings("TimeoutStopSec")[0])) == 0
    assert queue.stats().delivered == 1
    per.clear_faults()
    with run(command, env) as second:
        queue.record("ACME", "USER_2")
        per.wait_for(2)
        second.kill()
        queue.record("ACME", "USER_3")
    with run(command, env):
        queue.flush(10)
    assert set(users(per)) == {"USER_1", "USER_2", "USER_3"}


def run(command, env):
    """Start a command in the place of a child."""
    become = "import os, sys\nos.execvp(sys.argv[1], sys.argv[1:])"
    wanted = env | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    return Child(become, *command, env=wanted, isolated=True, measured=False)


@pytest.fixture
def pod():
    """The pod of the manifest: the sidecar and the application."""
    needs("yaml")
    import yaml

    [_, deployment] = yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8"))
    return deployment["spec"]["template"]["spec"]


def test_manifest_is_valid():
    """The manifest fits the schema of Kubernetes strictly, and one with a mistyped field does not."""
    needs("kubernetes_validate")
    import kubernetes_validate
    import yaml

    documents = list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == ["Secret", "Deployment"]
    for document in documents:
        kubernetes_validate.validate(document, "1.34", strict=True)
    documents[1]["spec"]["template"]["spec"]["initContainers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents[1], "1.34", strict=True)


def test_manifest_shares_one_outbox_in_each_pod(pod):
    """Sidecar and application see one file on one volume as one user, and only one has the token."""
    [sidecar], [application] = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["volumeMounts"] == application["volumeMounts"]
    assert "medium" not in pod["volumes"][0]["emptyDir"]
    variables = [{each["name"]: each.get("value") for each in one["env"]} for one in (sidecar, application)]
    assert variables[0]["PERQUEUE_OUTBOX"] == variables[1]["PERQUEUE_OUTBOX"]
    assert variables[1]["PERQUEUE_DRAIN"] == "false"
    assert ["PER_ACTIVITY_TOKEN" in each for each in variables] == [True, False]
    script = sidecar["command"][-1]
    [last] = re.findall(r"--timeout (\d+)", script)
    assert pod["terminationGracePeriodSeconds"] >= 2 * int(last)


def test_sidecar_delivers_what_is_left_before_it_ends(per, env, make_queue, pod):
    """At SIGTERM the sidecar's command delivers what is pending, and exits with 0."""
    queue = make_queue(drain=False, activity_type_id="TYPE")
    with run(pod["initContainers"][0]["command"], env) as sidecar:
        queue.record("ACME", "USER_1")
        queue.flush(10)
        per.set_fault(Latency(0.5), times=1)
        queue.record("ACME", "USER_2")
        per.wait_for(2)  # in flight
        sidecar.process.send_signal(signal.SIGTERM)
        for n in range(3, 30):
            queue.record("ACME", f"USER_{n}")
        assert sidecar.wait(20) == 0
    assert queue.stats().pending == 0
    assert set(users(per)) == {f"USER_{n}" for n in range(1, 30)}


def test_sidecar_that_cannot_begin_is_seen(env, pod, tmp_path):
    """A drainer that ends by itself takes its container with it: Kubernetes sees the exit code."""
    wrong = env | {"PERQUEUE_OUTBOX": str(tmp_path / "no" / "folder" / "activities.db")}
    with run(pod["initContainers"][0]["command"], wrong) as sidecar:
        assert sidecar.wait(20) == 1


def test_liveness_probe_restarts_only_what_a_restart_mends(per, env, outbox, make_queue, pod, until):
    """The probe fails if nobody delivers or the drainer is stuck; not in an outage, nor with a bad token."""
    probe = pod["initContainers"][0]["livenessProbe"]["exec"]["command"]

    def alive():
        return subprocess.run(probe, env=clean() | env, timeout=30, check=False).returncode == 0

    assert alive()  # before anything was recorded
    recorder = make_queue(drain=False, activity_type_id="TYPE")
    an_hour_ago = int((time.time() - 3600) * 1000)
    recorder._outbox.append("ACME", "USER_1", "TYPE", an_hour_ago)
    assert not alive()  # nobody drains
    with drain_lock(outbox):
        assert not alive()  # somebody is there, and nothing happens
    per.go_down()
    drainer = make_queue()
    until(lambda: drainer.stats().state == "backing_off")
    assert alive()  # an outage of an hour
    per.set_tokens({"another-token": ["activity"]})
    per.come_back()
    with pytest.raises(AuthenticationError):
        drainer.flush(10)
    assert drainer.stats().state == "paused"
    assert alive()
