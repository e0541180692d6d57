"""Counts the activities that it reads, and shows its metrics to Prometheus.

One activity a line on standard input, "BILLING_ID USER_ID". Metrics are at http://127.0.0.1:9464/metrics,
or on another port (an argument; 0: any). What they mean, alerts and a dashboard: docs/observability.md.

    pip install '.[otel]' opentelemetry-sdk opentelemetry-exporter-prometheus
    perqueue sandbox                                # elsewhere; export what it prints
    export PERQUEUE_OUTBOX=activities.db
    python examples/metrics_prometheus.py < usage.txt
"""

import sys

from opentelemetry import metrics
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server

from perqueue import InvalidActivity, OutboxError, PerQueue, PerQueueError


def main() -> None:
    metrics.set_meter_provider(MeterProvider(metric_readers=[PrometheusMetricReader()]))
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9464
    server, thread = start_http_server(port, addr="127.0.0.1")
    print(f"metrics are at http://127.0.0.1:{server.server_port}/metrics", flush=True)
    try:
        with PerQueue() as queue:  # finds OpenTelemetry's global meter provider by itself
            count(queue)
    except PerQueueError as error:
        print(f"not all of it is accepted: {error}", file=sys.stderr)
    server.shutdown()
    server.server_close()
    thread.join()


def count(queue: PerQueue) -> None:
    for line in sys.stdin:
        billing_id, _, user_id = line.strip().partition(" ")
        try:
            queue.record(billing_id, user_id)
        except InvalidActivity as error:
            print(f"skipped a line: {error}", file=sys.stderr)
        except OutboxError as error:  # disk full, say: perqueue_record_failures_total counts it
            print(f"not recorded: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
