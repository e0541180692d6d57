"""Application servers that fork and spawn: what their workers record is delivered, once."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.faults._needs import needs
from tests.helpers import BECOME, Child, repeats, until, users
from tests.servers import REQUESTS, Server, repository

APPLICATION = """
import os
from perqueue import PerQueue, PerQueueError

queue = PerQueue(exit_timeout=5.0)
made_in = os.getpid()

def answer(path):
    what, _, user = path.strip("/").partition("/")
    try:
        if what == "record":
            queue.record("GROUP", user)
        elif what == "wait":
            return queue.record("GROUP", user).wait(10)
        elif what == "flush":
            queue.flush(10)
        elif what == "stats":
            return str(queue.stats().state)
        return f"{made_in} {os.getpid()}"
    except PerQueueError as error:
        return f"{type(error).__name__}: {error}"

def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer(environ["PATH_INFO"]).encode()]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": answer(scope["path"]).encode()})
"""


def expected(*names, count=REQUESTS):
    return {f"{name}-{n}" for name in names for n in range(count)}


def assert_delivered_once(per, make_queue, wanted):
    """What was recorded has arrived, each once, at the latest with the next start."""
    make_queue(activity_type_id="TYPE").flush(20)
    assert set(users(per)) == wanted
    assert repeats(per) == 0


@pytest.fixture(autouse=True)
def application(tmp_path):
    (tmp_path / "application.py").write_text(APPLICATION)


GUNICORN = [sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:PORT", "--graceful-timeout=2"]
GUNICORN += ["--no-control-socket", "application:wsgi"]


@pytest.mark.parametrize("workers", ["sync", "sync preload", "gthread preload", "gevent", "gevent preload"])
def test_gunicorn(per, env, make_queue, tmp_path, workers):
    """Workers of gunicorn record, wait and flush, with a queue made before or after their fork.

    One of them killed, another takes its place. Each activity is delivered once (invariant 10).
    """
    kind, *preload = workers.split()
    needs("gunicorn", *(["gevent"] if kind == "gevent" else []))
    options = [f"--worker-class={kind}", "--workers=2", *(f"--{option}" for option in preload)]
    with Server(tmp_path, env, *GUNICORN, *options) as server:
        answers = server.load("first")
        made_in, workers = zip(*(answer.split() for answer in answers), strict=True)
        assert server.get("wait/waited").isalnum()
        server.get("flush")
        assert set(users(per)) == expected("first") | {"waited"}
        assert set(made_in) == ({str(server.process.pid)} if preload else set(workers)), server.log()
        os.kill(int(workers[0]), signal.SIGKILL)
        # Ended while it boots, a worker would not hear of it.
        until(lambda: server.get("hello").split()[1] not in workers, "a new worker answers", 30)
        assert not any("Error" in answer for answer in server.load("second"))
        log = server.stop()
    assert "Traceback" not in log, log
    assert_delivered_once(per, make_queue, expected("first", "second") | {"waited"})


def test_uvicorn(per, env, make_queue, tmp_path):
    """Workers of uvicorn, which are spawned, share an outbox; each activity is delivered once."""
    needs("uvicorn")
    command = [sys.executable, "-m", "uvicorn", "--workers=2", "--port=PORT", "application:asgi"]
    with Server(tmp_path, env, *command) as server:
        server.load("asgi")
        server.get("flush")
        assert set(users(per)) == expected("asgi")
        server.load("last")
        log = server.stop()
    assert "Traceback" not in log, log
    assert_delivered_once(per, make_queue, expected("asgi", "last"))


TASKS = """
import os
from celery import Celery
from perqueue import PerQueue

queue = PerQueue(exit_timeout=5.0)  # before Celery forks its pool
folder = os.environ["FOLDER"]
app = Celery("application", broker="filesystem://")
app.conf.broker_transport_options = {
    "data_folder_in": folder, "data_folder_out": folder, "control_folder": folder + "/control",
    "polling_interval": 0.1,
}
app.conf.worker_hijack_root_logger = False

@app.task
def count(user):
    queue.record("GROUP", user)

@app.task
def wait(user):
    queue.record("GROUP", user).wait(10)
"""


def test_celery_prefork(per, env, make_queue, tmp_path):
    """Tasks in Celery's prefork pool record into a queue that its parent made, and may wait for it."""
    needs("celery")
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "broker" / "control").mkdir(parents=True)
    environment = {**env, "FOLDER": str(tmp_path / "broker"), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *repository()])
    publish = """
    import tasks
    for n in range(30):
        tasks.count.delay(f"task-{n}")
    for n in range(4):
        tasks.wait.delay(f"waited-{n}")
    """
    with Child(publish, env={**environment, "PERQUEUE_DRAIN": "0"}, measured=False) as publisher:
        publisher.succeed(30)
    command = ["-m", "celery", "-A", "tasks", "worker", "--concurrency=3", "--pool=prefork"]
    command += ["--loglevel=error", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    with Child(BECOME, *command, env=environment, isolated=True, measured=False) as worker:
        per.wait_for(34, timeout=40)
        worker.process.send_signal(signal.SIGTERM)
        worker.wait(30)
        assert "Traceback" not in worker.errors()
    assert_delivered_once(per, make_queue, expected("task", count=30) | expected("waited", count=4))


def uwsgi():
    """Return the command that starts uWSGI."""
    for name in ("uwsgi", "pyuwsgi"):
        if found := shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            return [found]
    needs("pyuwsgi")
    return [sys.executable, "-c", "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])"]


UWSGI = ["--http-socket=127.0.0.1:PORT", "--master", "--processes=2", "--enable-threads", "--die-on-term"]
UWSGI += ["--need-app", "--module=application:wsgi", "--worker-reload-mercy=5"]


def wait_for_workers(server):
    """Wait until uWSGI has forked: told to end meanwhile, it may never do so."""
    until(lambda: "spawned uWSGI worker 2" in server.log(), "both workers are there", 20)


def test_uwsgi_forks_in_c_and_is_told_so(per, env, tmp_path):
    """In a worker that uWSGI has forked past Python's hooks record() raises, and names lazy-apps.

    Nothing hangs, and nothing is lost in silence (invariant 10).
    """
    with Server(tmp_path, env, *uwsgi(), *UWSGI) as server:
        wait_for_workers(server)
        answers = server.load("refused", 8)
        assert all(answer.startswith("OutboxError") and "lazy-apps" in answer for answer in answers), answers
        assert "lazy-apps" in server.get("flush", timeout=5)
        server.stop()
    assert users(per) == []


def test_uwsgi_with_lazy_apps(per, env, make_queue, tmp_path):
    """With lazy-apps and enable-threads, as the README says, uWSGI's workers deliver."""
    with Server(tmp_path, env, *uwsgi(), *UWSGI, "--lazy-apps") as server:
        wait_for_workers(server)
        server.load("lazy")
        server.get("flush")
        assert set(users(per)) == expected("lazy")
        server.load("last")
        server.stop()
    assert_delivered_once(per, make_queue, expected("lazy", "last"))
