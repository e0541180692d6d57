"""A sentinel token on every way out of the process: logs, tracebacks, pickles, files, other servers."""

import asyncio
import io
import logging
import os
import pickle
import stat
import traceback
from contextlib import contextmanager

import httpx
import pytest

from perqueue import PerClient, PerQueueError, RetryPolicy
from perqueue._wire import parser as parsers
from perqueue._wire.parser import H11Parser, HttptoolsParser
from perqueue._wire.redaction import Secret, mask_logs
from tests.faults._raw_server import RawServer, answer_to
from tests.helpers import Child

TOKEN = "GEHEIM-4711/activity+x=="
REPORTING = "GEHEIM-4711/reporting+y=="
MARK = "GEHEIM-4711"
REPORT = b'{"ok": true, "result": {"start": null, "end": null, "activityTypes": {}}}'


@pytest.fixture(autouse=True, params=[H11Parser, HttptoolsParser])
def _parser(request, monkeypatch):
    """What holds, holds with either parser."""
    monkeypatch.setattr(parsers, "_choice", request.param)


@contextmanager
def everything_logged():
    """Collect what any logger says, at DEBUG, with tracebacks."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    known = [root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    levels = [logger.level for logger in known]
    for logger in known:
        logger.setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        for logger, level in zip(known, levels, strict=True):
            logger.setLevel(level)


def shown(error):
    """Return all that may be shown of an exception: its chain, suppressed or not, with local variables."""
    parts = []
    while error is not None:
        parts += [str(error), repr(error), repr(vars(error)), repr(pickle.dumps(error))]
        parts += traceback.format_exception(error)
        frames = traceback.TracebackException.from_exception(error, capture_locals=True)
        # Our own frames: this file's hold the sentinel.
        frames.stack = traceback.StackSummary.from_list(
            [frame for frame in frames.stack if "/tests/" not in frame.filename]
        )
        parts += frames.format(chain=False)
        error = error.__cause__ or error.__context__
    return "\n".join(parts)


def token_in(request):
    return next(line for line in request.split(b"\r\n") if line.lower().startswith(b"authorization:"))[15:]


def in_a_header(wire, request):
    wire.send(answer_to(request, b"{}", extra=b"X-Debug: %s\r\n" % token_in(request)))


def in_a_cookie(wire, request):
    wire.send(answer_to(request, b"{}", extra=b"Set-Cookie: auth=%s; Path=/\r\n" % token_in(request)))


def in_the_location(wire, request):
    head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:9/?t=%s\r\nContent-Length: 0\r\n\r\n"
    wire.send(head % token_in(request).replace(b"/", b"%2F").replace(b"+", b"%2B").replace(b"=", b"%3D"))


def in_the_reason_phrase(wire, request):
    wire.send(b"HTTP/1.1 500 no %s\r\nContent-Length: 0\r\n\r\n" % token_in(request))


def in_a_broken_status_line(wire, request):
    wire.send(b"HTTP/9 %s\r\n\r\n" % token_in(request))
    return True


def in_a_broken_header(wire, request):
    wire.send(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n" % token_in(request).replace(b":", b""))
    return True


def in_the_transaction_id(wire, request):
    body = REPORT
    if b"activities.add" in request:
        body = b'{"ok": true, "result": {"transactionId": "T-%s-1"}}' % token_in(request).split()[-1]
    wire.send(answer_to(request, body))


def in_a_reason(wire, request):
    wire.send(answer_to(request, b'{"ok": false, "message": "no %s", "error": "x"}' % token_in(request)))


def in_an_error_field(wire, request):
    wire.send(answer_to(request, b'{"ok": false, "error": {"seen": "%s"}}' % token_in(request)))


def in_a_refusal_of_the_token(wire, request):
    body = b'{"ok": false, "message": "%s", "error": "invalid_auth_token"}' % token_in(request)
    wire.send(answer_to(request, body))


def in_a_report(wire, request):
    wire.send(answer_to(request, b'{"ok": true, "result": {"activityTypes": "%s"}}' % token_in(request)))


def in_a_page(wire, request):
    wire.send(answer_to(request, b"<html>%s</html>" % token_in(request)))


ECHOES = [
    in_a_header,
    in_a_cookie,
    in_the_location,
    in_the_reason_phrase,
    in_a_broken_status_line,
    in_a_broken_header,
    in_the_transaction_id,
    in_a_reason,
    in_an_error_field,
    in_a_refusal_of_the_token,
    in_a_report,
    in_a_page,
]


def attempt(queue, options):
    """Use everything that speaks to Per; return all that its values and exceptions show."""
    texts = []

    def call(action):
        try:
            texts.append(repr(action()))
        except PerQueueError as error:
            texts.append(shown(error))

    receipt = queue.record("GROUP_A", "USER_1")
    call(lambda: queue.flush(timeout=0.3))
    call(lambda: receipt.wait(0.1))
    call(queue.stats)
    call(queue.get_report)
    with PerClient(**options) as client:
        call(lambda: client.add_activity("GROUP_A", "USER_2", "TYPE"))
        call(client.get_report)
        texts.append(repr(client))
    texts += [repr(queue), repr(queue._settings), repr(vars(queue))]
    return "\n".join(texts)


def on_disk(directory):
    """Return the bytes of all files, the write-ahead log's too."""
    files = [path for path in directory.iterdir() if path.is_file()]
    assert {path.name.removeprefix("activities.db") for path in files} >= {"", "-wal", "-shm"}
    return b"".join(path.read_bytes() for path in files)


@pytest.fixture
def secretive(make_queue):
    """Make a queue with the sentinel tokens, and the options for a bare client."""

    def make(server, **given):
        options = {
            "base_url": server.url,
            "activity_token": TOKEN,
            "reporting_token": REPORTING,
            "request_timeout": 2,
            **given,
        }
        return make_queue(retry=RetryPolicy(base=0.02, cap=0.05), **options), options

    return make


@pytest.mark.parametrize(
    ("echo", "asked"),
    [(echo, False) for echo in ECHOES]
    + [(echo, True) for echo in (in_a_header, in_the_transaction_id, in_a_refusal_of_the_token)],
    ids=lambda value: getattr(value, "__name__", "from a callable" if value else "from a string"),
)
def test_a_token_that_is_echoed_goes_no_further(secretive, tmp_path, echo, asked):
    """Wherever a server repeats the token, no log at DEBUG, exception, traceback with local variables,
    pickle or file of ours has it (invariant 9).
    """
    tokens = {"activity_token": lambda: TOKEN, "reporting_token": lambda: REPORTING} if asked else {}
    with RawServer(echo) as server, everything_logged() as log:
        queue, options = secretive(server, **tokens)
        texts = attempt(queue, options)
        files = on_disk(tmp_path)
        queue.close()
    assert b"GROUP_A" in files
    assert MARK.encode() not in files
    assert MARK not in log.getvalue()
    assert MARK not in texts


def test_the_check_sees_a_token(secretive, tmp_path):
    """A control: the same server, asked by httpx alone, puts the token into a log."""
    with RawServer(in_a_header) as server, everything_logged() as log:
        httpx.get(server.url, headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
    assert MARK in log.getvalue()
    assert MARK in shown(ValueError(TOKEN))


def test_a_transaction_id_that_repeats_the_token_is_kept_without_it(secretive):
    """Per accepted the activity: it counts as accepted, under its ID with the token taken out."""
    with RawServer(in_the_transaction_id) as server:
        queue, _ = secretive(server)
        assert queue.record("GROUP_A", "USER_1").wait(10) == "T-[token]-1"


def test_httpcores_own_loggers_are_all_masked():
    """A logger that httpcore may use during our requests takes the token out, and only then."""

    async def main():
        mask_logs(TOKEN)
        with everything_logged() as log:
            for name in loggers:
                logging.getLogger(name).debug("%r %s", f"Bearer {TOKEN}".encode(), "a\\b")
        return log.getvalue()

    import httpcore  # noqa: F401 - makes its loggers

    loggers = [name for name in logging.root.manager.loggerDict if name.startswith("httpcore.")]
    assert len(loggers) >= 5
    said = asyncio.run(main())
    assert said.count("Bearer [token]") == len(loggers)
    assert MARK not in said
    with everything_logged() as log:
        logging.getLogger("httpcore.http11").debug("somebody else's %s", TOKEN)
    assert TOKEN in log.getvalue()


def test_a_debugging_event_loop_shows_no_token():
    """A future or a handle, which asyncio's debug mode prints, shows a token's place only."""
    assert repr(Secret(TOKEN)) == "'[token]'"
    assert (str(Secret(TOKEN)), f"{Secret(TOKEN)}") == (TOKEN, TOKEN)


def test_a_process_in_debug_mode_says_no_token(env, tmp_path):
    """With asyncio's debug mode, every logger at DEBUG, and a token callable that fails at last, nothing
    that the process writes has the token.
    """
    script = f"""
import logging
logging.basicConfig(level=logging.DEBUG)
for name in list(logging.root.manager.loggerDict):
    logging.getLogger(name).setLevel(logging.DEBUG)
asked = []
def token():
    asked.append(1)
    time.sleep(0.15)  # slow, which the debug mode reports
    if len(asked) > 2:
        raise RuntimeError("{TOKEN}")
    return "{TOKEN}"
queue = PerQueue(activity_token=token, request_timeout=1)
for number in range(4):
    queue.record("G", f"USER_{{number}}")
try:
    queue.flush(3)
except PerQueueError as error:
    logging.exception("flush")
    say(error)
queue.close()
"""
    with Child(script, env={**env, "PYTHONASYNCIODEBUG": "1"}, measured=False) as child:
        said = child.expect("", timeout=20)
        assert child.wait() == 0
        assert "DEBUG:asyncio" in child.errors()
        assert MARK not in child.errors() + said


def lead(header):
    def behave(wire, request):
        body = REPORT if b"reports.get" in request else None
        wire.send(answer_to(request, body, extra=header.replace("ELSEWHERE", wire.server.elsewhere).encode()))

    return behave


def redirect(target, status=307):
    def behave(wire, request):
        location = target.replace("ELSEWHERE", wire.server.elsewhere).encode()
        wire.send(b"HTTP/1.1 %d No\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % (status, location))

    return behave


LURES = {
    "absolute URL": redirect("http://ELSEWHERE/activities.add"),
    "absolute URL, 308": redirect("http://ELSEWHERE/activities.add", 308),
    "absolute path": redirect("/elsewhere/activities.add"),
    "path with two slashes": redirect("//ELSEWHERE/activities.add"),
    "other user info": redirect("http://user:password@ELSEWHERE/"),
    "Refresh": lead("Refresh: 0; url=http://ELSEWHERE/\r\n"),
    "Alt-Svc": lead('Alt-Svc: http/1.1="ELSEWHERE"; ma=3600\r\n'),
    "Content-Location": lead("Content-Location: http://ELSEWHERE/\r\n"),
    "Link": lead("Link: <http://ELSEWHERE/>; rel=preload\r\n"),
    "Set-Cookie": lead("Set-Cookie: session=tracked; Path=/\r\n"),
}


@pytest.mark.parametrize(
    ("name", "no_proxy"),
    [(name, None) for name in LURES] + [("Link", no_proxy) for no_proxy in ("", "*", "127.0.0.1")],
)
def test_nothing_leads_a_request_or_a_token_elsewhere(secretive, monkeypatch, name, no_proxy):
    """Redirects, headers that suggest another server, cookies and proxies in the environment: every request
    goes to Per, to Per's path, without a cookie (invariant 9).
    """
    heads = []

    def behave(wire, request):
        heads.append(request)
        return LURES[name](wire, request)

    with RawServer() as elsewhere, RawServer(behave) as server:
        server.elsewhere = f"127.0.0.1:{elsewhere.port}"
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, elsewhere.url)
            monkeypatch.setenv(variable.lower(), elsewhere.url)
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
            if no_proxy is not None:
                monkeypatch.setenv(variable, no_proxy)
        queue, options = secretive(server)
        attempt(queue, options)
        queue.close()
        assert elsewhere.connections == 0
    assert len(heads) >= 4
    for head in heads:
        line = head.split(b"\r\n")[0]
        assert line.startswith((b"GET /activities.add?", b"GET /reports.get "))
        assert b"cookie" not in head.lower()


def test_files_are_for_their_owner_alone_whatever_the_umask(per, options, make_queue, tmp_path):
    """Under umask 000 the outbox and every file beside it has mode 0600 (invariant 9)."""
    former = os.umask(0)
    try:
        queue = make_queue()
        queue.record("GROUP_A", "USER_1")
        queue.flush(10)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(former)
    assert set(modes.values()) == {0o600}, modes
    assert {"activities.db", "activities.db-wal", "activities.db-shm"} < set(modes)
