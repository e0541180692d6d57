"""Tokens go to Per and nowhere else; IDs go to Per, to the outbox, and into no log above DEBUG."""

import io
import json
import logging
import traceback

import httpx
import pytest

from perqueue import (
    ActivityRejected,
    AuthenticationError,
    PerAPIError,
    PerClient,
    PerQueueError,
    RetryPolicy,
)
from perqueue.sandbox import (
    BadToken,
    Disconnect,
    Hang,
    Html,
    OkWithoutResult,
    RateLimited,
    Redirect,
    Refuse,
    ResetBeforeAccepting,
    Status,
    TruncatedJson,
)

TOKEN = "GEHEIM-4711-activity"
REPORTING = "GEHEIM-4711-reporting"
SECRET = "GEHEIM-4711"
GROUP, USER = "GROUP-Weinberg", "USER-Rosenthal"


@pytest.fixture
def log():
    """Everything that any logger says, at DEBUG, with tracebacks, as a program would write it to a file."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s"))
    loud = io.StringIO()
    above = logging.StreamHandler(loud)
    above.setLevel(logging.INFO)
    root = logging.getLogger()
    former = root.level
    known = [
        logging.getLogger(name) for name in ("httpx", "httpcore", "h11", "asyncio", "perqueue", "filelock")
    ]
    levels = [logger.level for logger in known]
    for logger in (root, *known):
        logger.setLevel(logging.DEBUG)
    root.addHandler(handler)
    root.addHandler(above)
    yield lambda: (stream.getvalue(), loud.getvalue())
    root.removeHandler(handler)
    root.removeHandler(above)
    root.setLevel(former)
    for logger, level in zip(known, levels, strict=True):
        logger.setLevel(level)


def shown(error):
    """Return all that a program might show of an exception and of what led to it."""
    parts = []
    while error is not None:
        parts += [str(error), repr(error), repr(vars(error)), *traceback.format_exception(error)]
        error = error.__cause__
    return "\n".join(parts)


@pytest.fixture
def secretive(per, make_queue):
    """Make a queue with the sentinel tokens, which the sandbox knows."""
    per.set_tokens({TOKEN: ["activity"], REPORTING: ["reporting"]})

    def make(**given):
        return make_queue(
            **{
                "activity_token": TOKEN,
                "reporting_token": REPORTING,
                "retry": RetryPolicy(base=0.02, cap=0.05),
                "request_timeout": 0.3,
                "exit_timeout": 0.1,
                **given,
            }
        )

    return make


def attempt(queue):
    """Use everything that a queue offers, and return what its exceptions and reprs show."""
    texts = []

    def call(action):
        try:
            texts.append(repr(action()))
        except PerQueueError as error:
            texts.append(shown(error))

    receipt = queue.record(GROUP, USER)
    call(lambda: queue.flush(timeout=0.25))
    call(lambda: receipt.wait(0.05))
    call(queue.stats)
    call(queue.get_report)
    texts += [repr(queue), repr(receipt), repr(queue._settings), str(vars(queue))]
    with PerClient(
        **{
            name: getattr(queue._settings, name)
            for name in (
                "activity_token",
                "reporting_token",
                "base_url",
                "request_timeout",
                "transport",
                "proxy",
            )
        }
    ) as client:
        call(lambda: client.add_activity(GROUP, USER, "TYPE"))
        call(client.get_report)
        texts.append(repr(client))
    return "\n".join(texts)


def assert_secret(texts, log, directory):
    everything, loud = log()
    assert SECRET not in texts
    assert SECRET not in everything
    for name in (GROUP, USER):
        assert name not in loud
    files = [path for path in directory.iterdir() if path.is_file()]
    assert files
    assert b"GROUP-Weinberg" in b"".join(path.read_bytes() for path in files)
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path.name


def no(reason):
    return json.dumps({"ok": False, "message": reason})


# What the fault answers to a request with this token: a gateway may well repeat it.
FAULTS = {
    "none": lambda _: None,
    "bad token": lambda _: BadToken(),
    "bad token that echoes": lambda token: Refuse(f"Bearer {token} is not welcome", status=401),
    "forbidden": lambda token: Status(403, no(f"{token} may not"), "application/json"),
    "refusal that echoes": lambda token: Refuse(f"no such token: {token}", status=400),
    "refusal in an object": lambda token: Status(200, json.dumps({"ok": False, "error": {"token": token}})),
    "passing fault that echoes": lambda token: Refuse(f"internal error with {token}"),
    "500 that echoes": lambda token: Status(500, no(f"Bearer {token}")),
    "429 that echoes": lambda token: Status(429, no(f"Bearer {token}"), retry_after=0.05),
    "page that echoes": lambda token: Status(200, f"<html>{token}</html>"),
    "long answer that echoes": lambda token: Refuse(f"{'x' * 400} {token} {'x' * 400}"),
    "html": lambda _: Html(502),
    "truncated": lambda _: TruncatedJson(),
    "no result": lambda _: OkWithoutResult(),
    "redirect": lambda _: Redirect(),
    "429": lambda _: RateLimited(0.05),
    "reset": lambda _: ResetBeforeAccepting(),
    "disconnect": lambda _: Disconnect(),
    "hang": lambda _: Hang(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_no_answer_makes_a_token_visible(per, secretive, log, tmp_path, name):
    """Whatever Per or a proxy answers, no log, repr, exception or file holds a token (invariant 9)."""
    if name != "none":
        per.set_fault(FAULTS[name](TOKEN))
        per.set_fault(FAULTS[name](REPORTING), endpoint="reports.get")
    texts = attempt(secretive())
    assert_secret(texts, log, tmp_path)


@pytest.mark.parametrize(
    "make_error",
    [
        lambda request: httpx.LocalProtocolError(
            f"Illegal header value {request.headers['Authorization']!r}"
        ),
        lambda request: UnicodeEncodeError("ascii", request.headers["Authorization"], 0, 1, "ordinal"),
        lambda request: RuntimeError(f"with {request.headers['Authorization']}"),
        lambda request: httpx.ConnectError(
            f"{request.headers['Authorization']} at {request.url}", request=request
        ),
        lambda request: ValueError({"headers": str(request.headers["authorization"])}),
    ],
    ids=["header", "unicode", "runtime", "connect", "value"],
)
def test_no_error_of_a_transport_makes_a_token_visible(secretive, log, tmp_path, make_error):
    """An error that quotes the request's headers is told without them (invariant 9)."""

    def fail(request):
        raise make_error(request)

    texts = attempt(secretive(transport=httpx.MockTransport(fail)))
    assert_secret(texts, log, tmp_path)


def bad_vault():
    raise RuntimeError(f"vault refused to give {SECRET}")


@pytest.mark.parametrize(
    "token",
    [bad_vault, lambda: f"{SECRET}\n", lambda: f"{SECRET} x", lambda: f"é{SECRET}"],
    ids=["raises", "line break", "space", "not ASCII"],
)
def test_a_callable_that_fails_makes_no_token_visible(secretive, log, tmp_path, token):
    """What a vault raises, or returns by mistake, is told without its content (invariant 9)."""
    queue = secretive(activity_token=token, reporting_token=token)
    with pytest.raises(AuthenticationError) as caught:
        queue.get_report()
    texts = attempt(queue) + shown(caught.value)
    assert_secret(texts, log, tmp_path)


def test_a_password_of_a_proxy_is_not_shown(secretive, log, tmp_path):
    """A proxy's password is a secret like a token (invariant 9)."""
    queue = secretive(proxy=f"http://user:{SECRET}@127.0.0.1:9")
    texts = attempt(queue)
    assert_secret(texts, log, tmp_path)


def test_ids_reach_no_log_above_debug_even_if_per_repeats_them(per, secretive, log, tmp_path):
    """A reason that repeats billing and user ID is stored, and not logged with them (invariant 9)."""
    for status, reason in ((401, f"not for {GROUP} {USER}"), (200, f"internal error with {GROUP} {USER}")):
        per.clear_faults()
        per.set_fault(Refuse(reason, status=status), endpoint="both")
        queue = secretive()
        attempt(queue)
        queue.close()
    assert_secret("", log, tmp_path)


def test_no_text_of_an_exception_holds_an_id(per, secretive):
    """An exception may be logged: IDs that Per repeats in its reason are not in its text (invariant 9)."""
    per.set_fault(Refuse(f"no such group {GROUP}, user {USER}"))
    queue = secretive()
    receipt = queue.record(GROUP, USER)
    texts = []
    for action in (lambda: queue.flush(5), lambda: receipt.wait(5)):
        with pytest.raises(ActivityRejected) as caught:
            action()
        texts.append(str(caught.value))
        assert caught.value.reason.startswith("no such group")
    with PerClient(activity_token=TOKEN, base_url=per.url) as client:
        with pytest.raises(ActivityRejected) as caught:
            client.add_activity(GROUP, USER, "TYPE")
        texts.append(str(caught.value))
    for text in texts:
        assert GROUP not in text
        assert USER not in text


def test_the_check_for_secrets_sees_one(per, secretive, log, tmp_path):
    """A control: a token in the log, in a text or in the outbox is noticed."""
    per.set_fault(Refuse("no such group"))
    queue = secretive()
    queue.record(GROUP, USER)
    with pytest.raises(ActivityRejected):
        queue.flush(5)
    assert_secret("", log, tmp_path)
    with pytest.raises(AssertionError):
        assert_secret(TOKEN, log, tmp_path)
    logging.getLogger("httpcore").debug("%s", TOKEN)
    with pytest.raises(AssertionError):
        assert_secret("", log, tmp_path)
    (tmp_path / "activities.db-extra").write_text(TOKEN)
    with pytest.raises(AssertionError):
        assert_secret("", lambda: ("", ""), tmp_path)
    with pytest.raises(AssertionError):
        assert_secret("", lambda: ("", f"WARNING {USER}"), tmp_path)


def test_an_exception_of_the_bare_client_names_status_and_reason(per, options):
    """What a program needs to react is in the exception's attributes."""
    per.set_fault(Status(418, "<html>teapot</html>"), endpoint="both")
    with PerClient(**options) as client, pytest.raises(PerAPIError) as caught:
        client.get_report()
    assert (caught.value.status, caught.value.code) == (418, None)
