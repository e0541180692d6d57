"""What `perqueue doctor` finds on the way to Per, over real sockets."""

import json
import signal
import socket
import ssl
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from perqueue import PerQueue
from perqueue._wire.tls import tls_context
from perqueue.cli._checks.answer import Answer, Conversation, _skew
from perqueue.cli._checks.answer import look as look_at_answer
from perqueue.cli._checks.certificate import Certificate
from perqueue.cli._checks.deadline import Deadline
from perqueue.cli._checks.reach import Target, Unreachable, _connect, reach
from perqueue.sandbox import Html, HugeBody, RateLimited, Redirect, Refuse, Sandbox, Status
from tests.faults._raw_server import RawServer, answer_to

SECRETS = ("secret-activity-token", "secret-reporting-token")
TOKENS = dict(zip(("PER_ACTIVITY_TOKEN", "PER_REPORTING_TOKEN"), SECRETS, strict=True))
NO_TOKEN = b'{"ok": false, "message": "invalid_auth_token"}'
NO_NAME = b'{"ok": false, "message": "invalid_billing_id"}'


@pytest.fixture
def look(perqueue, outbox):
    """Run doctor on an outbox of a given origin; return exit code and the findings about the network."""

    def run(url, *arguments, **more):
        PerQueue(outbox, drain=False, base_url=url).close()
        result = perqueue("doctor", "--json", *arguments, **{"PER_BASE_URL": url, **TOKENS, **more})
        for secret in SECRETS:
            assert secret not in result.output
        found = json.loads(result.stdout)["findings"]
        return result.exit_code, {each["about"]: each for each in found}

    return run


@pytest.fixture
def ask(per, look):
    """Look at the way to the sandbox; by default with the right tokens."""
    per.set_tokens({SECRETS[0]: ["activity"], SECRETS[1]: ["reporting"]})
    return lambda **more: look(per.url, **more)


def level(finding):
    return finding["level"], finding["text"] + (f" -> {finding['remedy']}" if finding["remedy"] else "")


# --- Tokens


def test_tokens_that_work_and_nothing_is_counted(ask, per):
    """With good tokens nothing is wrong, the lines say how that was found out, and no activity was added."""
    code, found = ask()
    assert code == 0
    for about in ("port", "tls", "answer", "skew", "activity", "reporting"):
        assert found[about]["level"] == "ok", found[about]
    assert (
        "did not refuse PER_ACTIVITY_TOKEN. Asked with a request that names nobody"
        in found["activity"]["text"]
    )
    assert "Per gives a report for PER_REPORTING_TOKEN" in found["reporting"]["text"]
    assert per.accepted == 0
    asked = [(seen.path, seen.query) for seen in per.request_log]
    assert [path for path, _ in asked] == ["/activities.add", "/activities.add", "/reports.get"]
    assert [query for path, query in asked if path == "/activities.add"] == ["", ""]
    assert "Authorization" not in per.request_log[0].headers


@pytest.mark.parametrize(
    ("given", "about", "words"),
    [
        (
            {"PER_ACTIVITY_TOKEN": "unknown"},
            "activity",
            "refuses PER_ACTIVITY_TOKEN (HTTP 401, invalid_auth_token)",
        ),
        ({"PER_REPORTING_TOKEN": "unknown"}, "reporting", "refuses PER_REPORTING_TOKEN (HTTP 401"),
        ({"PER_ACTIVITY_TOKEN": SECRETS[1]}, "activity", "are the two tokens swapped?"),
        ({"PER_REPORTING_TOKEN": SECRETS[0]}, "reporting", "are the two tokens swapped?"),
        ({"PER_ACTIVITY_TOKEN": "Bearer " + SECRETS[0]}, "activity", "leave out the word Bearer"),
        ({"PER_ACTIVITY_TOKEN": SECRETS[0] + "\n"}, "activity", "a line break"),
        ({"PER_REPORTING_TOKEN": "naïve"}, "reporting", "printable ASCII"),
    ],
)
def test_a_token_that_is_wrong(ask, per, given, about, words):
    """A token that is unknown, malformed or of the other scope is a problem, and only that one is."""
    code, found = ask(**given)
    assert code == 1
    assert found[about]["level"] == "problem"
    assert words in level(found[about])[1]
    assert {each["level"] for name, each in found.items() if name in ("activity", "reporting")} == {
        "ok",
        "problem",
    }
    assert per.accepted == 0


def test_a_token_that_is_not_set(ask):
    """Without a token in the environment nothing is wrong: the program may have it from elsewhere."""
    code, found = ask(PER_ACTIVITY_TOKEN="", PER_REPORTING_TOKEN="")
    assert code == 0
    assert (found["activity"]["level"], found["reporting"]["level"]) == ("warning", "warning")
    assert "not set here" in found["activity"]["text"]


def test_a_token_in_quotation_marks(perqueue, make_queue, per):
    """Quotes that an env file has kept are named, beside Per's refusal."""
    make_queue(drain=False)
    result = perqueue("doctor", PER_ACTIVITY_TOKEN=f'"{per.activity_token}"')
    assert result.exit_code == 1
    assert "PER_ACTIVITY_TOKEN begins or ends with a quotation mark" in result.output
    assert "Per refuses PER_ACTIVITY_TOKEN" in result.output
    assert per.activity_token not in result.output


def test_a_refusal_that_says_nothing_of_the_token(ask, per):
    """If Per refuses a request without a token for its parameters, too, doctor says that it knows nothing."""
    per.set_fault(Refuse("missing_parameters"))
    code, found = ask(PER_ACTIVITY_TOKEN="unknown")
    assert code == 0
    assert found["activity"]["level"] == "warning"
    assert "nothing is known (HTTP 200, missing_parameters)" in found["activity"]["text"]


def test_a_refusal_for_the_parameters_is_no_scope(ask, per):
    """Where a refusal says nothing of the token, a bad reporting token is bad, and not called swapped."""
    per.set_fault(Refuse("missing_parameters"))
    code, found = ask(PER_REPORTING_TOKEN="unknown")
    assert code == 1
    assert "Per refuses PER_REPORTING_TOKEN (HTTP 401" in found["reporting"]["text"]


def test_a_yes_of_a_server_that_fails_is_none(look):
    """A yes with a status that says otherwise is not Per's word, and nothing is known of the token."""

    def torn(wire, request):
        if b"Bearer" in request:
            body = answer_to(request, b'{"ok": true, "result": {"transactionId": "T-1"}}')
            wire.send(body.replace(b"200 OK", b"500 Oops"))
        else:
            wire.send(answer_to(request, NO_TOKEN))

    with RawServer(torn) as server:
        code, found = look(server.url)
    assert code == 0
    assert (found["activity"]["level"], found["reporting"]["level"]) == ("warning", "warning")
    assert "did not say whether it knows this token: HTTP 500" in found["activity"]["text"]


def test_a_yes_to_a_request_that_names_nobody_is_told(look):
    """Should Per count a request without names after all, that is a problem, with its transaction ID."""

    def careless(wire, request):
        body = b'{"ok": true, "result": {"transactionId": "T-1"}}'
        wire.send(answer_to(request, body if b"Bearer" in request else NO_TOKEN))

    with RawServer(careless) as server:
        code, found = look(server.url)
    assert code == 1
    assert "to a request that names nobody (HTTP 200, T-1)" in found["activity"]["text"]


@pytest.mark.parametrize("padding", [0, 490])
def test_a_token_that_is_echoed_is_not_shown(look, padding):
    """Whatever the server repeats, no token is printed, nor a part of one."""

    def echo(wire, request):
        _, _, token = request.partition(b"Bearer ")
        said = token.split(b"\r\n")[0] or b"invalid_auth_token"
        said = b"-" * padding + said if token else said  # so that the reason is cut within the token
        wire.send(answer_to(request, b'{"ok": false, "message": "%s"}' % said))

    with RawServer(echo) as server:
        _, found = look(server.url)
    assert SECRETS[0][:6] not in found["activity"]["text"]
    assert "[token]" in found["activity"]["text"]


def test_tokens_go_nowhere_that_only_the_file_names(look, per):
    """If PER_BASE_URL does not name the outbox's origin, Per is asked without any token, and that is told."""
    code, found = look(per.url, PER_BASE_URL="")
    assert code == 0
    assert per.url in found["activity"]["text"]
    assert "PER_BASE_URL only" in found["activity"]["text"]
    code, found = look(per.url, PER_BASE_URL="http://127.0.0.1:9")
    assert code == 1
    assert "programs refuse it" in found["variables"]["text"]
    assert found["answer"]["level"] == "ok"
    assert [seen.headers.get("Authorization") for seen in per.request_log] == [None, None]


def test_offline_asks_nobody(look, per):
    """With --offline Per gets no request, and the form of the tokens is looked at all the same."""
    code, found = look(per.url, "--offline", PER_ACTIVITY_TOKEN="two words")
    assert code == 1
    assert found["activity"]["level"] == "problem"
    assert "has the form of a token" in found["reporting"]["text"]
    assert "answer" not in found
    assert per.requests == 0


def test_a_wait_that_per_asked_for_is_kept(ask, per, make_queue, until):
    """While a Retry-After is in force, doctor makes no request either."""
    per.set_fault(Status(503, retry_after=60))
    queue = make_queue(activity_token=SECRETS[0])
    queue.record("GROUP_A", "USER_1")
    until(lambda: queue.stats().resumes_at is not None)
    before = per.requests
    code, found = ask()
    assert code == 0
    assert found["answer"]["level"] == "warning"
    assert "Per wants no request before" in found["answer"]["text"]
    assert per.requests == before


def test_no_log_shows_a_token(look, caplog):
    """Not even at DEBUG does a log show a token that the server repeats in a header."""
    caplog.set_level("DEBUG")

    def echo(wire, request):
        _, _, token = request.partition(b"Bearer ")
        extra = b"X-Seen: %s\r\n" % (token.split(b"\r\n")[0] or b"nothing")
        wire.send(answer_to(request, NO_NAME if token else NO_TOKEN, extra=extra))

    with RawServer(echo) as server:
        look(server.url)
    assert "X-Seen" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]


# --- Who answers


@pytest.mark.parametrize(
    ("fault", "says", "words"),
    [
        (Html(), "problem", "that is not Per's JSON"),
        (
            Redirect("http://portal.example/login?from=here"),
            "problem",
            "elsewhere, to http://portal.example;",
        ),
        (Status(502), "problem", "Per or what stands before it fails"),
        (RateLimited(), "warning", "it asks for fewer requests"),
    ],
    ids=["captive portal", "redirect", "bad gateway", "too many"],
)
def test_what_answers_is_not_per(ask, per, fault, says, words):
    """A captive portal, a redirect or a broken gateway is named, and no token is sent to it."""
    per.set_fault(fault)
    code, found = ask()
    assert (found["answer"]["level"], code) == (says, 1 if says == "problem" else 0)
    assert words in found["answer"]["text"]
    assert [seen.headers.get("Authorization") for seen in per.request_log] == [None]


def test_cookies_are_not_kept(look):
    """What a server sets does not come back to it."""
    cookies = []

    def bake(wire, request):
        cookies.append(b"cookie" in request.lower())
        said = NO_NAME if b"Bearer" in request else NO_TOKEN
        wire.send(answer_to(request, said, extra=b"Set-Cookie: a=b; Path=/\r\n"))

    with RawServer(bake) as server:
        look(server.url)
    assert cookies == [False] * 3


def test_a_server_that_says_yes_to_everybody_is_not_per(look):
    """What accepts a request without a token gets none."""
    requests = []

    def yes(wire, request):
        requests.append(request)
        wire.send(answer_to(request, b'{"ok": true, "result": {"id": 1}}'))

    with RawServer(yes) as server:
        code, found = look(server.url)
    assert code == 1
    assert "yes to a request without a token" in found["answer"]["text"]
    assert len(requests) == 1


@pytest.mark.parametrize(
    ("seconds", "says"), [(0, "ok"), (30, "warning"), (-30, "warning"), (-7200, "problem")]
)
def test_the_clock_is_compared(look, seconds, says):
    """A clock that differs from the answer's Date is named, with the direction and what it changes."""

    def skewed(wire, request):
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
        wire.send(
            answer_to(
                request, NO_NAME if b"Bearer" in request else NO_TOKEN, extra=b"Date: %s\r\n" % date.encode()
            )
        )

    with RawServer(skewed) as server:
        code, found = look(server.url)
    assert (found["skew"]["level"], code) == (says, 1 if says == "problem" else 0)
    if seconds:
        assert ("behind" if seconds > 0 else "ahead") in found["skew"]["text"]
        assert "no bill" in found["skew"]["text"]


@pytest.mark.parametrize(
    ("ahead", "took", "says"),
    [
        (0, 0, "ok"), (2.9, 0, "ok"), (3.1, 0, "warning"), (60.9, 0, "warning"), (61.1, 0, "problem"),
        (-1.9, 0, "ok"), (-2.1, 0, "warning"), (-59.9, 0, "warning"), (-60.1, 0, "problem"),
        (-30, 60, "ok"),
    ],
)  # fmt: skip
def test_a_clock_is_wrong_only_if_that_is_certain(ahead, took, says):
    """A Date is cut to its second, and written somewhen in the request: within that no clock is wrong."""
    there = 1_543_622_400
    headers = httpx.Headers({"date": "Sat, 01 Dec 2018 00:00:00 GMT"})
    asked_at = there + ahead
    assert _skew(Answer(200, headers, b"", asked_at, asked_at + took, took)).level == says


def test_a_proxy_of_the_environment_is_not_used(ask):
    """The question takes the way that delivery takes: no proxy but that of the option."""
    nowhere = "http://127.0.0.1:9"
    code, found = ask(HTTP_PROXY=nowhere, HTTPS_PROXY=nowhere, ALL_PROXY=nowhere, http_proxy=nowhere)
    assert (code, found["answer"]["level"]) == (0, "ok")


def test_of_an_endless_answer_only_the_beginning_is_read(per):
    """An answer that goes on for ever fills no memory."""
    per.set_fault(HugeBody(100_000_000))
    target = Target(base_url=per.url, context=tls_context(verify=True), environ={})
    conversation = Conversation(target, Deadline(10))
    assert len(conversation.ask("/activities.add", {}).body) < 2_000_000
    conversation.close()


# --- The way there


def test_the_next_address_is_tried():
    """An address that refuses costs nothing; one that swallows everything is told; the next one counts."""
    with RawServer() as server, socket.socket() as hole, ExitStack() as stack:
        target = Target(base_url=server.url, context=tls_context(verify=True), environ={})
        refused = list(_connect(target, ["127.0.0.2", "127.0.0.1"], Deadline(5)))
        assert [each.level for each in refused] == ["ok"]
        hole.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        hole.bind(("127.0.0.2", server.port))
        fill(hole, stack)
        found, warning = _connect(target, ["127.0.0.2", "127.0.0.1"], Deadline(5))
    assert "127.0.0.1 port" in found.text
    assert "127.0.0.2" in warning.text
    assert warning.level == "warning"


def fill(listener, stack):
    """Let a bound socket listen, and its queue be full: who connects gets no answer."""
    listener.listen(0)
    for _ in range(3):
        filler = stack.enter_context(socket.socket())
        filler.setblocking(False)
        filler.connect_ex(listener.getsockname())


def test_a_closed_port_and_a_proxy_that_is_not_heeded(look):
    """A refused connection is a problem; a proxy in the environment is named without its password."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code, found = look(url)
    assert code == 1
    assert "Connection refused" in found["port"]["text"]
    assert "PROXY" not in found["port"]["remedy"]
    assert "see above" in found["activity"]["text"]
    _, found = look(url, HTTPS_PROXY="http://me:password@proxy.example")
    assert "HTTPS_PROXY is set, which perqueue does not heed" in found["port"]["remedy"]
    assert "password" not in str(found)


@pytest.mark.parametrize("behave", ["silence", "a drip", "the end"])
def test_an_answer_that_does_not_come_ends_in_time(behave):
    """A server that is silent, drips, or hangs up is given up at the deadline, and is no Per."""

    def stall(wire, request):
        if behave == "a drip":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            while not wire.server.stopped.wait(0.05):
                wire.send(b" ")
        return behave == "the end"

    with RawServer(stall) as server:
        target = Target(base_url=server.url, context=tls_context(verify=True), environ={})
        conversation = Conversation(target, Deadline(0.4))
        began = time.monotonic()
        (finding,) = look_at_answer(conversation, target)
        conversation.close()
        assert time.monotonic() - began < 3
    assert (finding.about, finding.level, conversation.is_per) == ("answer", "problem", False)
    assert "does not answer" in finding.text


def test_a_name_that_nobody_knows(look):
    """A host that cannot be looked up is a problem of the name service."""
    code, found = look("https://nobody.invalid")
    assert code == 1
    assert found["name"]["level"] == "problem"
    assert "port" not in found


def way(url, context=None, seconds=0.4, **environ):
    """Return the findings on the way, and where it ends."""
    target = Target(base_url=url, context=context or tls_context(verify=True), environ=environ)
    found = []
    try:
        found.extend(reach(target, Deadline(seconds)))
    except Unreachable as end:
        found.append(end.finding)
    return found


def test_a_black_hole_ends_in_time():
    """An address that swallows everything is given up at the deadline."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        fill(listener, stack)
        began = time.monotonic()
        found = way(f"https://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - began < 3
    assert "does not answer within" in found[-1].text


def test_a_server_that_says_nothing_of_tls_ends_in_time():
    """A port that takes connections and then is silent is given up at the deadline, and told so."""
    with RawServer() as server:
        began = time.monotonic()
        found = way(f"https://127.0.0.1:{server.port}")
        assert time.monotonic() - began < 3
    assert [each.about for each in found] == ["port", "tls"]
    assert "says nothing of TLS" in found[-1].text


def test_a_server_without_tls():
    """Plain HTTP behind an https URL is told as what does not speak TLS."""
    with Sandbox() as per:
        found = way(per.url.replace("http:", "https:"), seconds=5)
        assert per.requests == 0
    assert "does not speak TLS" in found[-1].text


def test_a_step_that_hangs_does_not_hold_up_anything():
    """The deadline holds whatever a step does, and its errors and results come through."""
    deadline = Deadline(0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = socket.create_connection(silent.getsockname())
        began = time.monotonic()
        with client, pytest.raises(TimeoutError):
            deadline.run(lambda: client.recv(1) and None, 60)
        assert time.monotonic() - began < 30
    assert Deadline(5).run(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        Deadline(5).run(lambda: 1 / 0, 5)


def test_it_streams_and_ends_on_ctrl_c(start, outbox):
    """What is known is shown while Per keeps it waiting, and Ctrl-C ends that at once."""
    with RawServer(lambda *_: None) as server:
        PerQueue(outbox, drain=False, base_url=server.url).close()
        program = start("doctor", PER_BASE_URL=server.url)
        while "tls" not in (line := program.out.next(15)):
            assert line is not None
        began = time.monotonic()
        program.process.send_signal(signal.SIGINT)
        code, out, _ = program.wait()
        assert time.monotonic() - began < 3
    assert code == 1
    assert not any("answer" in line for line in out)


# --- Certificates


@pytest.fixture(scope="module")
def authority():
    """The certificate authority that is trusted."""
    return trustme.CA(organization_name="Good Authority")


@pytest.fixture
def served(authority, tmp_path):
    """Look at the way to a server with a certificate; return the finding about TLS, and its requests."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def see(certificate):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(context)
        trust = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with RawServer(tls=context) as server:
            found = way(server.url, trust, seconds=5)
            assert server.requests == []
        return found[-1]

    return see


def test_a_certificate_that_is_trusted(served, authority):
    """A good certificate is told with its issuer and its end."""
    finding = served(authority.issue_cert("localhost"))
    assert (finding.about, finding.level) == ("tls", "ok")
    assert "TLSv1.3, certificate from Good Authority" in finding.text
    assert "valid until 3000-01-01" in finding.text


def test_a_certificate_that_ends_soon(served, authority):
    """One that should have been renewed is a warning, with the time that is left."""
    finding = served(
        authority.issue_cert("localhost", not_after=datetime.now(UTC) + timedelta(days=3, minutes=1))
    )
    assert (finding.about, finding.level) == ("tls", "warning")
    assert "ends in 3 d" in finding.text


def test_a_certificate_with_names_of_other_kinds(served, authority):
    """A certificate may also name a folder of persons, say: it is looked at like any other."""
    signer = load_pem_private_key(authority.private_key_pem.bytes(), None)
    issuer = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
    key = ec.generate_private_key(ec.SECP256R1())
    folder = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "somebody")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(issuer.subject, folder, key.public_key(), 7, now, now + timedelta(days=90))
        .add_extension(
            x509.SubjectAlternativeName([x509.DirectoryName(folder), x509.DNSName("localhost")]), False
        )
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), False)
        .sign(signer, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    finding = served(trustme.LeafCert(private, made.public_bytes(Encoding.PEM), []))
    assert (finding.about, finding.level) == ("tls", "ok"), finding.text


@pytest.mark.parametrize(
    ("days", "left", "soon"),
    [(90, 10, False), (90, 8, True), (398, 15, False), (398, 13, True), (6, 1, False)],
)
def test_when_a_certificate_should_have_been_renewed(days, left, soon):
    """Two weeks before its end, or in the last tenth of a short one's life."""
    day = 86400.0
    assert Certificate("issuer", (), 0.0, days * day).ends_soon((days - left) * day) == soon


BAD = {
    "expired": (
        lambda ca: ca.issue_cert("localhost", not_after=datetime.now(UTC) - timedelta(days=2)),
        "has expired",
    ),
    "wrong host": (lambda ca: ca.issue_cert("elsewhere.example"), "elsewhere.example"),
    "intercepted": (
        lambda _: trustme.CA(organization_name="Corp Proxy").issue_cert("localhost"),
        "Corp Proxy",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_certificate_that_is_not_trusted(served, authority, kind):
    """An expired, foreign or intercepting certificate is named with its issuer, and nothing is sent."""
    make, words = BAD[kind]
    finding = served(make(authority))
    assert finding.level == "problem"
    assert "the certificate is not trusted" in finding.text
    assert words in finding.text
    assert "valid until" in finding.text
    assert "--ca-file" in finding.remedy


def test_a_certificate_of_its_own_and_ca_file(look, authority, tmp_path):
    """With --ca-file doctor trusts what the program trusts, and all the rest is looked at, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with Sandbox(ssl_context=context, tokens={SECRETS[0]: ["activity"], SECRETS[1]: ["reporting"]}) as per:
        url = per.url.replace("127.0.0.1", "localhost")
        code, found = look(url)
        assert (code, found["tls"]["level"]) == (1, "problem")
        assert per.requests == 0
        code, found = look(url, "--ca-file", tmp_path / "ca.pem")
        assert code == 0
        assert found["name"]["level"] == found["tls"]["level"] == found["activity"]["level"] == "ok"


def test_a_ca_file_without_certificates(perqueue, make_queue, tmp_path):
    """What is no list of certificates is misuse."""
    make_queue(drain=False)
    (tmp_path / "ca.pem").write_text("nothing")
    result = perqueue("doctor", "--ca-file", tmp_path / "ca.pem")
    assert result.exit_code == 2
    assert "no certificates" in result.stderr


@pytest.mark.parametrize("without_per", [("--offline",), ("--salvage", "new.db")])
def test_a_ca_file_is_for_asking_per(perqueue, make_queue, tmp_path, without_per):
    """Whoever names authorities expects Per to be asked: together with what asks nobody it is misuse."""
    make_queue(drain=False)
    (tmp_path / "ca.pem").write_text("nothing")
    result = perqueue("doctor", "--ca-file", tmp_path / "ca.pem", *without_per)
    assert result.exit_code == 2
    assert "--ca-file is for asking Per" in result.stderr
