"""From the true answer to the one that a fault sends in its place."""

from datetime import timedelta
from email.utils import format_datetime
from http import HTTPStatus

from perqueue.sandbox._bad_answers import (
    BadToken,
    Html,
    OkWithoutResult,
    RateLimited,
    Redirect,
    Refuse,
    ResultId,
    Status,
    TruncatedJson,
)
from perqueue.sandbox._fault import Fault
from perqueue.sandbox._period import utc_now
from perqueue.sandbox._wire import Answer, json_answer, refused

_PAGE = "<!DOCTYPE html><html><head><title>{0}</title></head><body><h1>{0}</h1></body></html>"


def spoil(fault: Fault, true: Answer) -> Answer:
    """Return what this fault answers; faults of the connection leave the answer as it is."""
    match fault:
        case RateLimited():
            answer = _with_retry_after(refused("rate_limited", status=429), fault)
        case Status():
            plain = Answer(body=fault.body.encode(), status=fault.code, content_type=fault.content_type)
            answer = _with_retry_after(plain, fault)
        case Refuse():
            answer = refused(fault.reason, status=fault.status, key=fault.key)
        case BadToken():
            answer = refused("invalid_auth_token", status=fault.status)
        case Html():
            answer = _page(fault.status)
        case Redirect():
            answer = Answer(body=b"", status=fault.status, headers={"Location": fault.location})
        case OkWithoutResult():
            answer = json_answer({"ok": True})
        case ResultId():
            answer = Answer(body=true.body.replace(b'"transactionId"', b'"id"', 1), status=true.status)
        case TruncatedJson():
            answer = Answer(body=half(true.body), status=true.status)
        case _:
            answer = true
    return answer


def half(body: bytes) -> bytes:
    """Return the first half."""
    return body[: len(body) // 2]


def _page(status: int) -> Answer:
    title = "Sign in to the network" if status == 200 else f"{status} {_phrase(status)}"
    body = _PAGE.format(title).encode()
    return Answer(body=body, status=status, content_type="text/html")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"


def _with_retry_after(answer: Answer, fault: RateLimited | Status) -> Answer:
    value = fault.retry_after
    if value is None:
        return answer
    if fault.as_date and not isinstance(value, str):
        value = format_datetime(utc_now() + timedelta(seconds=value), usegmt=True)
    return Answer(
        body=answer.body,
        status=answer.status,
        content_type=answer.content_type,
        headers={"Retry-After": str(value)},
    )
