"""A web application that counts its users: the handler writes to the outbox, never to the network.

    export PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
    python examples/hot_path_web.py 8000
    curl 'http://127.0.0.1:8000/?group=GROUP_A&user=USER_1'

Any WSGI server can serve `application`; this one comes with Python.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIServer, make_server

from perqueue import InvalidActivity, OutboxError, PerQueue

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

log = logging.getLogger("hot_path_web")


def not_recorded(error: OutboxError) -> None:
    """Let a full disk cost a log line, not the user's request; error.activity says what was missed."""
    log.error("not counted: %s", error)


# One for the process, shared by all of its threads.
queue = PerQueue(
    os.environ.get("PERQUEUE_OUTBOX", "hot_path_web.db"),
    on_record_error=not_recorded,
)


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    """Do something for a user, and count it."""
    query = parse_qs(environ["QUERY_STRING"])
    group, user = query.get("group", [""])[0], query.get("user", [""])[0]
    try:
        queue.record(billing_id=group, user_id=user)
    except InvalidActivity as error:
        start_response("400 Bad Request", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{error}\n".encode()]
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [b"done\n"]


class Server(ThreadingMixIn, WSGIServer):
    """A thread for each request."""

    daemon_threads = True


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    # Without a handler SIGTERM ends Python at once. Leaving by SystemExit runs the exit handlers, and
    # perqueue's delivers for up to exit_timeout. What is left then waits on disk for the next start.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    with make_server("127.0.0.1", port, application, server_class=Server) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
