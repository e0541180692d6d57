"""Flask counts its users: one queue, made with the application.

export PERQUEUE_OUTBOX=activities.db PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
gunicorn --config gunicorn_conf.py 'flask_app:create_app()'
curl -X POST 'http://127.0.0.1:8000/export?company=ACME&user=USER_1'
"""

from __future__ import annotations

import logging

from flask import Flask, current_app, request

from perqueue import InvalidActivity, OutboxError, PerQueue

log = logging.getLogger("shop")


def not_recorded(error: OutboxError) -> None:
    """Let a full disk cost a log line, not the user's request; error.activity says what was missed."""
    log.error("not counted: %s", error)


def create_app() -> Flask:
    app = Flask(__name__)
    app.extensions["perqueue"] = PerQueue(on_record_error=not_recorded)

    @app.post("/export")
    def export() -> tuple[dict[str, str], int]:
        """Do something for a user, and count it."""
        queue: PerQueue = current_app.extensions["perqueue"]
        try:
            queue.record(request.args.get("company", ""), request.args.get("user", ""))
        except InvalidActivity as error:
            return {"error": str(error)}, 400
        return {"export": "done"}, 200

    return app
