"""Celery tasks that count users: one queue for each process of the pool.

    export PERQUEUE_OUTBOX=activities.db PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
    celery --app celery_worker worker --concurrency 3

Who only sends tasks imports this module too, and needs neither token nor outbox.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from perqueue import PerQueue

app = Celery("shop", broker=os.environ.get("CELERY_BROKER_URL", "redis://localhost"))

queue: PerQueue


@worker_process_init.connect
def open_queue(**_: object) -> None:
    global queue  # noqa: PLW0603 - one for each process
    queue = PerQueue()


@worker_process_shutdown.connect
def close_queue(**_: object) -> None:
    queue.close()  # these processes run no exit handlers


@app.task
def export(company: str, user: str) -> None:
    """Do something for a user, and count it. A task that is run again changes no bill."""
    queue.record(billing_id=company, user_id=user)
