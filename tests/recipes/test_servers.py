"""The web recipes, run by real servers: every request counted, workers restarted and killed without loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults._needs import needs
from tests.helpers import repeats, users
from tests.recipes.conftest import Users, assert_counted, restarted_and_killed
from tests.servers import Server, repository

DOCS = Path(__file__).resolve().parents[2] / "docs" / "recipes"
GUNICORN = [sys.executable, "-m", "gunicorn", "--config=gunicorn_conf.py", "--bind=127.0.0.1:PORT"]
GUNICORN += ["--no-control-socket"]


def test_fastapi_under_uvicorn(per, env, make_queue, copied):
    """FastAPI in two workers of uvicorn, replaced by SIGHUP and killed: every answered request is counted."""
    needs("fastapi", "uvicorn")
    command = [sys.executable, "-m", "uvicorn", "fastapi_app:app", "--workers=2", "--port=PORT"]
    with Server(copied("fastapi_app.py"), env, *command) as server:
        visitors = Users(server)
        restarted_and_killed(server, lambda name: visitors.come(name, 20))
        log = server.stop()
    assert "Traceback" not in log, log
    assert_counted(per, make_queue, visitors)


def test_flask_under_gunicorn(per, env, make_queue, copied):
    """Flask, loaded before gunicorn forks, with workers replaced and killed: every answer is counted."""
    needs("flask", "gunicorn")
    with Server(
        copied("flask_app.py", "gunicorn_conf.py"), env, *GUNICORN, "flask_app:create_app()"
    ) as server:
        visitors = Users(server)
        restarted_and_killed(server, lambda name: visitors.come(name, 20))
        assert server.request("POST", "export?company=ACME")[0] == 400
        log = server.stop()
    assert "Traceback" not in log, log
    assert_counted(per, make_queue, visitors)


FORGETFUL = """
from perqueue import InvalidActivity, OutboxError, PerClient

class PerQueue:
    def __init__(self, **_):
        self._kept = []

    def record(self, company, user):
        self._kept.append((company, user))
        if len(self._kept) == 3:  # 100 users, and no worker sends what it has left
            with PerClient() as client:
                while self._kept:
                    client.add_activity(*self._kept.pop())
"""


def test_checker_sees_a_recorder_that_keeps_activities_in_memory(per, env, make_queue, copied):
    """A recorder that buffers in memory loses some of what it answered for, and is found out."""
    needs("flask", "gunicorn")
    folder = copied("flask_app.py", "gunicorn_conf.py")
    (folder / "forgetful.py").write_text(FORGETFUL)
    example = folder / "flask_app.py"
    example.write_text(example.read_text().replace("from perqueue import", "from forgetful import"))
    with Server(folder, env, *GUNICORN, "--threads=1", "flask_app:create_app()") as server:
        visitors = Users(server)
        restarted_and_killed(server, lambda name: visitors.come(name, 20))
        server.stop()
    with pytest.raises(AssertionError, match="Extra items in the left set"):
        assert_counted(per, make_queue, visitors)


def manage(folder, env, *arguments):
    """Run Django's command line in a project."""
    path = os.pathsep.join([str(folder), *repository()])
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PER")}
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=folder,
        env={**clean, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_django_under_gunicorn(per, env, make_queue, copied):
    """Django counts what is committed, each once, and nothing that is rolled back; migrate needs no token."""
    needs("django", "gunicorn")
    folder = copied("django_app", "gunicorn_conf.py")
    manage(folder, {}, "migrate", "--verbosity=0")
    with Server(folder, env, *GUNICORN, "wsgi") as server:
        visitors, failing = Users(server), Users(server, "&fail")
        visitors.come("first", 50)
        failing.come("failed", 4)
        server.stop()
    assert (len(visitors.answered), failing.answered) == (50, set())
    assert_counted(per, make_queue, visitors)
    assert repeats(per) == 0


def test_django_goes_on_when_it_cannot_record(env, copied):
    """A failure to record after the commit is logged by Django, and costs the user nothing."""
    needs("django", "gunicorn")
    folder = copied("django_app")
    manage(folder, {}, "migrate", "--verbosity=0")
    nowhere = {**env, "PERQUEUE_OUTBOX": str(folder / "no" / "such" / "folder" / "activities.db")}
    asked = (
        "from django.test import Client;print(Client().post('/export?company=ACME&user=USER_1').status_code)"
    )
    output = manage(folder, nowhere, "shell", "-c", asked)
    assert re.search(r"^200$", output, re.MULTILINE), output
    assert "Error calling count.<locals>.record in on_commit()" in output


RACE = """
import threading, time
from django.apps import apps
import shop.apps
class PerQueue:
    def __init__(self):
        made.append(self)
        time.sleep(0.2)
made, shop.apps.PerQueue = [], PerQueue
threads = [threading.Thread(target=lambda: apps.get_app_config("shop").queue) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("made", len(made))
"""


def test_django_makes_one_queue_whichever_request_is_first(copied):
    """Requests that come at once when a process begins share one queue."""
    needs("django")
    assert "made 1\n" in manage(copied("django_app"), {}, "shell", "-c", RACE)


def test_django_tests_as_in_the_recipe(copied):
    """The tests that the recipe shows pass under `manage.py test`, and fail if nothing is counted."""
    needs("django")
    folder = copied("django_app")
    [shown] = re.findall(
        r"^```python\n(# shop/tests.py\n.*?)^```", (DOCS / "django.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (folder / "shop" / "tests.py").write_text(shown)
    assert "Ran 2 tests" in manage(folder, {}, "test")
    billing = folder / "shop" / "billing.py"
    billing.write_text(billing.read_text().replace("transaction.on_commit(", "dict(record=record) or print("))
    with pytest.raises(
        AssertionError, match="expected 1 recorded with billing_id='ACME', user_id='USER_1', found"
    ):
        manage(folder, {}, "test")


def test_a_backlog_is_delivered_by_the_next_start(per, env, copied, until):
    """With preload, what an outage left is delivered once the application has made its queue again."""
    needs("flask", "gunicorn")
    folder = copied("flask_app.py", "gunicorn_conf.py")
    per.go_down()
    with Server(folder, env, *GUNICORN, "flask_app:create_app()") as server:
        assert server.request("POST", "export?company=ACME&user=USER_1")[0] == 200
    per.come_back()
    assert users(per) == []
    with Server(folder, env, *GUNICORN, "flask_app:create_app()"):
        until(lambda: users(per) == ["USER_1"])
