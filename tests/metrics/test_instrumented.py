"""The command line under OpenTelemetry's own launcher, as `docs/observability.md` shows it."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig

import httpx

from tests.helpers import free_port


def test_the_drainer_shows_metrics_without_a_line_of_code(per, env, make_queue, until):
    """`opentelemetry-instrument perqueue drain --watch` exports what it delivers."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    launcher = shutil.which("opentelemetry-instrument", path=sysconfig.get_path("scripts"))
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PER_", "PERQUEUE_"))}
    drainer = subprocess.Popen(
        [launcher, sys.executable, "-m", "perqueue", "drain", "--watch"],
        env=clean
        | env
        | {
            "OTEL_METRICS_EXPORTER": "prometheus",
            "OTEL_EXPORTER_PROMETHEUS_HOST": "127.0.0.1",
            "OTEL_EXPORTER_PROMETHEUS_PORT": str(port),
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        },
        stderr=subprocess.PIPE,
    )
    try:
        per.wait_for(1, timeout=30)

        def scraped():
            answer = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)
            return [line for line in answer.text.splitlines() if line.startswith("perqueue_")]

        wanted = ("perqueue_drain_requests_total", "perqueue_outbox_delivered_total")
        until(lambda: sum(line.startswith(wanted) and line.endswith(" 1.0") for line in scraped()) == 2)
        drainer.send_signal(signal.SIGTERM)
        _, errors = drainer.communicate(timeout=30)
        assert drainer.returncode == 0, errors
    finally:
        drainer.kill()
        drainer.communicate()
