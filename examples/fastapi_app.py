"""FastAPI (or Starlette) counts its users: one queue for each worker, made and closed by the lifespan.

export PERQUEUE_OUTBOX=activities.db PER_ACTIVITY_TOKEN=... PER_ACTIVITY_TYPE_ID=...
uvicorn fastapi_app:app --workers 2
curl -X POST 'http://127.0.0.1:8000/export?company=ACME&user=USER_1'
"""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request

from perqueue import OutboxError, PerQueue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = logging.getLogger("shop")


def not_recorded(error: OutboxError) -> None:
    """Let a full disk cost a log line, not the user's request; error.activity says what was missed."""
    log.error("not counted: %s", error)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.queue = PerQueue(on_record_error=not_recorded)
    yield
    await app.state.queue.aclose()  # what Per has not got yet stays in the outbox, for the next start


app = FastAPI(lifespan=lifespan)


@app.post("/export")
async def export(request: Request, company: str, user: str) -> dict[str, str]:
    """Do something for a user, and count it: microseconds, so it may be called from the event loop."""
    request.app.state.queue.record(billing_id=company, user_id=user)
    return {"export": "done"}
