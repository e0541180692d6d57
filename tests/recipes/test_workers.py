"""The recipes without a web server: Celery's pool, a process that freezes between two calls, a script."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys

from perqueue._audit import history
from tests.faults._needs import needs
from tests.helpers import Child, repeats, until, users
from tests.recipes.conftest import EXAMPLES
from tests.servers import children, repository

SHOP = """
import os
from celery_worker import app, export
folder = os.environ["FOLDER"]
app.conf.broker_url = "filesystem://"
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder + "/control",
    "polling_interval": 0.05,
}
app.conf.worker_hijack_root_logger = False
"""


def kill_all(worker):
    pool = children(worker.pid)
    worker.kill()
    for pid in pool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_celery(per, env, outbox, make_queue, copied, tmp_path):
    """Tasks count users once each, though the pool's processes are recycled, all killed, and started anew.

    Who only sends tasks has neither token nor outbox.
    """
    needs("celery")
    copied("celery_worker.py")
    (tmp_path / "shop_app.py").write_text(SHOP)
    (tmp_path / "broker" / "control").mkdir(parents=True)
    sender = {"FOLDER": str(tmp_path / "broker"), "PYTHONWARNINGS": "ignore"}
    sender["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *repository()])
    send = """
    from shop_app import export
    while name := hear():
        for n in range(20):
            export.delay("ACME", f"{name}-{n}")
    """
    become = "import os, sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = ["-m", "celery", "--app", "shop_app", "worker", "--concurrency=2", "--max-tasks-per-child=7"]
    command += ["--loglevel=error", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with Child(send, env=sender, measured=False) as shop:
        with Child(become, *command, env=sender | env, isolated=True, measured=False) as worker:
            shop.tell("first")
            per.wait_for(20, timeout=40)
            per.go_down()
            shop.tell("last")
            until(lambda: len(history(outbox)) == 40, "all tasks are done", 40)
            kill_all(worker)
            per.come_back()
        with Child(become, *command, env=sender | env, isolated=True, measured=False) as worker:
            per.wait_for(40, timeout=40)
            kill_all(worker)
            assert "Traceback" not in worker.errors()
    make_queue(activity_type_id="TYPE").flush(20)
    assert set(users(per)) == {f"{name}-{n}" for name in ("first", "last") for n in range(20)}


CALLED = """
import json
import sys
sys.path.insert(0, sys.argv[1])
import lambda_handler

class Context:
    def get_remaining_time_in_millis(self):
        return int(sys.argv[2])

say("ready")
while event := hear():
    try:
        say(lambda_handler.handler(json.loads(event), Context())["statusCode"])
    except PerQueueError as error:
        say(type(error).__name__)
"""


class Function:
    """A function that is frozen from its answer to its next call."""

    def __init__(self, child):
        self._child = child
        child.expect("ready")
        self._freeze()

    def _freeze(self):
        self._child.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._child.pid, os.WSTOPPED)

    def call(self, user):
        self._child.process.send_signal(signal.SIGCONT)
        self._child.tell(json.dumps({"company": "ACME", "user": user}))
        answer = self._child.expect("")
        self._freeze()
        return answer


def test_lambda_has_delivered_when_it_answers(per, env, make_queue, copied):
    """Per has an activity before the call is answered, whatever the freezes did to the connection."""
    with Child(CALLED, copied("lambda_handler.py"), 20_000, env=env, measured=False) as child:
        function = Function(child)
        for n in range(4):
            assert function.call(f"USER_{n}") == "200"
            assert users(per) == [f"USER_{n}" for n in range(n + 1)]
            if n == 1:
                per.go_down()  # the kept connection dies in the freeze
                per.come_back()
        assert repeats(per) == 0


def test_lambda_fails_during_an_outage_and_a_repeat_changes_no_bill(per, env, copied):
    """What cannot be delivered in time is an error; the event that is sent again counts one user."""
    with Child(CALLED, copied("lambda_handler.py"), 2500, env=env, measured=False) as child:
        function = Function(child)
        per.go_down()
        assert function.call("USER_1") == "FlushTimeout"
        per.come_back()
        assert users(per) == []  # frozen
        assert function.call("USER_1") == "200"
        assert per.unique("ACME") == 1


def test_checker_sees_a_function_that_does_not_flush(per, env, copied, tmp_path):
    """Without the flush at its end a call is answered, and while the process is frozen Per has nothing."""
    folder = copied("lambda_handler.py")
    handler = folder / "lambda_handler.py"
    handler.write_text(re.sub(r"queue\.flush\(.*\)", "pass", handler.read_text()))
    per.go_down()
    with Child(CALLED, folder, 20_000, env=env, measured=False) as child:
        function = Function(child)
        assert function.call("USER_1") == "200"
        per.come_back()
        assert users(per) == []
        child.process.send_signal(signal.SIGCONT)
        per.wait_for(1)


def test_script_of_the_recipe(per, env, tmp_path):
    """The script that the recipe shows ends when Per has it all."""
    text = (EXAMPLES.parent / "docs" / "recipes" / "script.md").read_text(encoding="utf-8")
    [script] = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PER")}
    subprocess.run([sys.executable, "-W", "error", "-c", script], env=clean | env, cwd=tmp_path, check=True)
    assert sorted(users(per)) == ["USER_0", "USER_1", "USER_2"]
