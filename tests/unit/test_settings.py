import inspect
import math
import ssl
import traceback
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perqueue import AsyncPerClient, ConfigurationError, PerClient, PerQueue, RetryPolicy
from perqueue._settings import (
    DEFAULT_BASE_URL,
    checked_token,
    is_loopback,
    origin_of,
    resolve_client_settings,
    resolve_settings,
)

SECRET = "GEHEIM-4711"
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(PerQueue.__init__).parameters.items()
    if name != "self"
}
CLIENT_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(AsyncPerClient.__init__).parameters.items()
    if name != "self"
}


def resolve(environ=None, **given):
    """Resolve the options of a queue as its constructor does, from an environment of the test's own."""
    return resolve_settings(
        environ or {},
        **{**DEFAULTS, "outbox": "/var/lib/app/activities.db", "activity_token": "token", **given},
    )


def refuse(environ=None, **given):
    """Resolve options that must be refused, and return all that the error shows."""
    with pytest.raises(ConfigurationError) as caught:
        resolve(environ, **given)
    assert isinstance(caught.value, ValueError)
    return "".join(traceback.format_exception(caught.value)) + repr(caught.value)


def test_the_defaults_are_those_of_the_contract():
    """Without options there is a default for everything but the outbox and the token."""
    settings = resolve()
    assert settings.base_url == settings.origin == DEFAULT_BASE_URL == "https://api.useper.com"
    assert (settings.drain, settings.durability, settings.max_in_flight) == (True, "process", 32)
    assert (settings.max_pending, settings.keep_delivered) == (10_000_000, timedelta(days=35))
    assert (settings.flush_timeout, settings.exit_timeout, settings.request_timeout) == (30.0, 2.0, 10.0)
    assert settings.retry == RetryPolicy(base=0.5, cap=60.0, retry_after_cap=300.0, activity_cap=900.0)
    assert (settings.activity_type_id, settings.reporting_token, settings.proxy) == (None, None, None)
    assert (settings.verify, settings.transport) == (True, None)
    assert settings.on_record_error is settings.on_rejected is settings.on_stalled is None
    assert settings.meter_provider is None


def test_settings_cannot_be_changed_and_do_not_show_tokens():
    """Options are frozen once they are resolved, and their repr holds no secret (invariant 9)."""
    settings = resolve(
        activity_token=SECRET, reporting_token=SECRET, proxy=f"http://user:{SECRET}@proxy.example:3128"
    )
    with pytest.raises(AttributeError):
        settings.drain = False
    assert SECRET not in repr(settings)
    assert settings.activity_token == SECRET


# --- From the environment ---


@pytest.mark.parametrize(
    ("variable", "option", "value", "means"),
    [
        ("PERQUEUE_OUTBOX", "outbox", "/srv/a.db", Path("/srv/a.db")),
        ("PER_ACTIVITY_TOKEN", "activity_token", "from-environment", "from-environment"),
        ("PER_REPORTING_TOKEN", "reporting_token", "from-environment", "from-environment"),
        ("PER_ACTIVITY_TYPE_ID", "activity_type_id", "TYPE", "TYPE"),
        ("ACTIVITY_TYPE_ID", "activity_type_id", "TYPE", "TYPE"),
        ("PER_BASE_URL", "base_url", "https://per.example", "https://per.example"),
        ("PERQUEUE_DRAIN", "drain", "false", False),
    ],
)
def test_an_option_that_is_not_given_comes_from_the_environment(variable, option, value, means):
    """Each documented variable stands in for its option."""
    assert getattr(resolve({variable: value}, **{option: None}), option) == means


@pytest.mark.parametrize(
    ("variable", "option", "value"),
    [
        ("PERQUEUE_OUTBOX", "outbox", "/given.db"),
        ("PER_ACTIVITY_TOKEN", "activity_token", "given"),
        ("PER_REPORTING_TOKEN", "reporting_token", "given"),
        ("PER_ACTIVITY_TYPE_ID", "activity_type_id", "given"),
        ("ACTIVITY_TYPE_ID", "activity_type_id", "given"),
        ("PER_BASE_URL", "base_url", "https://given.example"),
    ],
)
def test_an_option_that_is_given_beats_the_environment(variable, option, value):
    """What the program says counts, even if the environment holds nonsense."""
    assert str(getattr(resolve({variable: "\n bad \n"}, **{option: value}), option)) == value


def test_drain_given_beats_the_environment():
    """`drain=True` delivers whatever `PERQUEUE_DRAIN` says."""
    assert resolve({"PERQUEUE_DRAIN": "nonsense"}, drain=True).drain is True
    assert resolve({"PERQUEUE_DRAIN": "1"}, drain=False).drain is False


def test_of_two_variables_for_the_activity_type_our_own_counts():
    """`PER_ACTIVITY_TYPE_ID` comes before the quick start's `ACTIVITY_TYPE_ID`; an empty one is none."""
    both = {"PER_ACTIVITY_TYPE_ID": "OURS", "ACTIVITY_TYPE_ID": "QUICK_START"}
    assert resolve(both).activity_type_id == "OURS"
    assert resolve({**both, "PER_ACTIVITY_TYPE_ID": ""}).activity_type_id == "QUICK_START"


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "Yes", "on", " true ", ""])
def test_words_that_switch_the_drain_on(text):
    """Usual words for yes are understood, in any case; an empty variable is none, and the drain is on."""
    assert resolve({"PERQUEUE_DRAIN": text}).drain is True


@pytest.mark.parametrize("text", ["0", "false", "False", "NO", "off"])
def test_words_that_switch_the_drain_off(text):
    """Usual words for no are understood, in any case."""
    assert resolve({"PERQUEUE_DRAIN": text}, activity_token=None).drain is False


@pytest.mark.parametrize("text", ["maybe", "2", "ja", "none"])
def test_any_other_word_for_the_drain_is_an_error(text):
    """A word that means neither is refused: nobody finds out months later that nothing was delivered."""
    assert "PERQUEUE_DRAIN must be true or false" in refuse({"PERQUEUE_DRAIN": text})


def test_a_queue_takes_everything_from_the_environment(monkeypatch, tmp_path, per):
    """`PerQueue()` without any argument works where the environment says it all."""
    monkeypatch.setenv("PERQUEUE_OUTBOX", str(tmp_path / "activities.db"))
    monkeypatch.setenv("PER_ACTIVITY_TOKEN", per.activity_token)
    monkeypatch.setenv("PER_REPORTING_TOKEN", per.reporting_token)
    monkeypatch.setenv("ACTIVITY_TYPE_ID", per.activity_type_id)
    monkeypatch.setenv("PER_BASE_URL", per.url)
    with PerQueue() as queue:
        queue.record("GROUP_A", "USER_1")
        queue.flush()
        assert queue.get_report("2020-01-01T00:00:00Z").unique("GROUP_A") == 1


def test_the_clients_take_theirs_from_the_environment(monkeypatch, per):
    """The bare clients read the same variables."""
    monkeypatch.setenv("PER_ACTIVITY_TOKEN", per.activity_token)
    monkeypatch.setenv("PER_ACTIVITY_TYPE_ID", per.activity_type_id)
    monkeypatch.setenv("PER_BASE_URL", per.url)
    with PerClient() as client:
        assert client.add_activity("GROUP_A", "USER_1") == per.activities[0].transaction_id


# --- Tokens ---

BAD_TOKENS = [
    "",
    " ",
    f"{SECRET} x",
    f" {SECRET}",
    f"{SECRET}\n",
    f"{SECRET}\r\nX-Evil: 1",
    f"{SECRET}\t",
    f"{SECRET}\0",
    f"{SECRET}\x7f",
    f"{SECRET}é",
    f"{SECRET}\u2028",
    f"{SECRET}\ud800",
    f"{SECRET}😀",
    SECRET.encode(),
    4711,
    [SECRET],
    SECRET * 400,
]


@pytest.mark.parametrize("name", ["activity_token", "reporting_token"])
@pytest.mark.parametrize("token", BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_a_malformed_token_is_refused_at_once_without_being_shown(name, token):
    """A token that no header can carry is a `ConfigurationError` that names it and hides it (invariant 9)."""
    shown = refuse(**{name: token})
    assert f"{name} must be" in shown
    assert SECRET not in shown


@pytest.mark.parametrize("name", ["activity_token", "reporting_token"])
def test_a_malformed_token_in_the_environment_is_not_shown_either(name):
    """The environment's token is checked like a given one (invariant 9)."""
    shown = refuse({f"PER_{name.upper()}": f"{SECRET}\n"}, **{name: None})
    assert name in shown
    assert SECRET not in shown


@pytest.mark.parametrize("token", ["x", "A" * 4096, "!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~", "a.b-c_d~e+f/g=="])
def test_any_printable_ascii_without_spaces_is_a_token(token):
    """Per's tokens have no documented form, so anything that a header can carry is taken."""
    assert checked_token("activity_token", token) == token


@given(st.text())
def test_the_rule_for_tokens_is_total(token):
    """Any text is a token or a `ConfigurationError`, and never another error."""
    try:
        assert checked_token("activity_token", token) == token
    except ConfigurationError as error:
        assert len(token) < 4 or token not in str(error)  # noqa: PT017 - either way is right
    else:
        assert token.isascii()
        assert token.isprintable()


def test_a_callable_is_asked_later():
    """A token's callable is not called at construction: a secret store may be slow."""

    def fetch():
        raise AssertionError("called too early")

    assert resolve(activity_token=fetch, reporting_token=fetch).activity_token is fetch


def test_a_queue_that_drains_needs_a_token():
    """Without a token there is nothing to deliver with: told at once, with both remedies."""
    shown = refuse(activity_token=None)
    assert "PER_ACTIVITY_TOKEN" in shown
    assert "drain=False" in shown
    assert resolve(activity_token=None, drain=False).activity_token is None


# --- The base URL ---


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://api.useper.com", "https://api.useper.com"),
        ("https://api.useper.com/", "https://api.useper.com"),
        ("https://API.UsePer.com:443", "https://api.useper.com"),
        ("https://per.example:8443", "https://per.example:8443"),
        ("https://per.example/v1/", "https://per.example"),
        ("HTTPS://per.example", "https://per.example"),
        ("https://xn--bcher-kva.example", "https://xn--bcher-kva.example"),
        ("https://[2001:db8::1]:8443", "https://[2001:db8::1]:8443"),
        ("https://192.0.2.7", "https://192.0.2.7"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://127.8.9.10", "http://127.8.9.10"),
        ("http://localhost:80", "http://localhost"),
        ("http://LOCALHOST:8080", "http://localhost:8080"),
        ("http://[::1]:8080", "http://[::1]:8080"),
    ],
)
def test_a_base_url_is_taken_and_has_an_origin(url, origin):
    """HTTPS anywhere and plain HTTP to this machine are taken; case and default port make no other origin."""
    settings = resolve(base_url=url)
    assert settings.base_url == url.rstrip("/")
    assert settings.origin == origin


@pytest.mark.parametrize(
    "url",
    [
        "http://api.useper.com",
        "http://192.0.2.7",
        "http://10.0.0.1",
        "http://0.0.0.0",
        "http://[::]",
        "http://[2001:db8::1]",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://127.1",
        "http://2130706433",
        "http://mylocalhost",
        "HTTP://api.useper.com",
    ],
)
def test_plain_http_leaves_this_machine_never(url):
    """Plain HTTP would show the token to the network,
    so only loopback addresses may have it (invariant 9).
    """
    assert "must be https" in refuse(base_url=url)


@pytest.mark.parametrize(
    "url",
    [
        "api.useper.com",
        "https://",
        "https:///path",
        "https:api.useper.com",
        "//api.useper.com",
        "ftp://api.useper.com",
        "file:///etc/passwd",
        "unix:///run/per.sock",
        "https://api.useper.com:0",
        "https://api.useper.com:99999",
        "https://api.useper.com:https",
        "https://[::1",
        "https://api.useper.com ",
        " https://api.useper.com",
        "https://api.use\nper.com",
        "https://api.useper.com\r\nHost: evil",
        "https://api.useper.com/\0",
        "https://bücher.example",
        "https://api.useper.com\u200b",
        "https://api.useper.com?x=1",
        "https://api.useper.com#x",
        "https://user@api.useper.com",
        "http://127.0.0.1@evil.example",
        "http://127.0.0.1\\@evil.example",
        b"https://api.useper.com",
        443,
        httpx.URL("https://api.useper.com"),
    ],
)
def test_any_other_base_url_is_refused_at_once(url):
    """What is not plainly scheme, host and port is a `ConfigurationError`."""
    assert "base_url must" in refuse(base_url=url)


def test_a_password_in_a_base_url_is_not_shown():
    """A base URL with a password is refused without repeating it (invariant 9)."""
    shown = refuse(base_url=f"https://user:{SECRET}@api.useper.com")
    assert "no user name, password" in shown
    assert SECRET not in shown


@given(st.text())
@example("http://[")
@example("https://[v1.x]")
@example("https://a:b:c")
@example("https://\u2100.com")
def test_the_rule_for_base_urls_is_total(text):
    """Any text is a usable base URL or a `ConfigurationError`, and never another error."""
    for url in (text, f"https://{text}", f"http://{text}"):
        try:
            origin = resolve_client_settings({}, **{**CLIENT_DEFAULTS, "base_url": url}).origin
        except ConfigurationError:
            continue
        assert origin.startswith(("https://", "http://"))


@pytest.mark.parametrize("host", ["", "example.com", "128.0.0.1", "localhost.", "127.0.0.1.", "0"])
def test_only_this_machine_is_loopback(host):
    """A name that might be resolved to anything is not this machine."""
    assert not is_loopback(host)


def test_an_origin_has_no_path():
    """An outbox belongs to scheme, host and port."""
    assert origin_of("https://per.example:8443/v1/x") == "https://per.example:8443"


# --- The outbox's path ---


def test_a_relative_outbox_is_made_absolute_at_once(monkeypatch, tmp_path):
    """A program that later changes its directory keeps its outbox."""
    monkeypatch.chdir(tmp_path)
    settings = resolve(outbox="activities.db")
    monkeypatch.chdir("/")
    assert settings.outbox == tmp_path.resolve() / "activities.db"
    assert settings.outbox.is_absolute()


@pytest.mark.parametrize("form", [str, Path])
def test_an_outbox_is_a_str_or_a_path(form, tmp_path):
    """Both ways to name a file mean the same one."""
    assert resolve(outbox=form(tmp_path / "a b" / "日本.db")).outbox == tmp_path.resolve() / "a b" / "日本.db"


def test_home_and_symlinks_are_resolved(monkeypatch, tmp_path):
    """`~` is the home directory, and a link names the file that it leads to, as SQLite sees it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    assert resolve(outbox="~/link.db").outbox == tmp_path.resolve() / "real.db"


@pytest.mark.parametrize(
    ("outbox", "says"),
    [
        (None, "outbox is missing"),
        ("", "outbox is missing"),
        (b"/tmp/a.db", "not bytes"),
        (7, "not int"),
        (":memory:", "a file on disk"),
        ("file:a.db?mode=memory", "a file on disk"),
        ("a\0.db", "a file on disk"),
        (f"postgresql://user:{SECRET}@{SECRET}@host/db", "must look like postgresql://user@host/database"),
        (f"mysql://user:{SECRET}@host/db", "or a postgresql:// URL"),
        ("sqlite:///a.db", "or a postgresql:// URL"),
    ],
)
def test_an_outbox_that_is_no_file_is_refused(outbox, says):
    """Memory, URLs and missing paths are refused at once, without a password in the text."""
    shown = refuse(outbox=outbox)
    assert says in shown
    assert SECRET not in shown


# --- Numbers, words and callables ---

NO_NUMBERS = [None, "5", b"5", True, math.nan, math.inf, -math.inf, -1, -0.001, [5], timedelta(seconds=5), 1j]


@pytest.mark.parametrize("name", ["request_timeout", "exit_timeout", "stalled_after", "flush_timeout"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_seconds_that_are_no_seconds_are_refused(name, value):
    """A timeout is a finite, non-negative number; `None` is no limit where that is documented."""
    if name == "flush_timeout" and value is None:
        assert resolve(flush_timeout=None).flush_timeout is None
    else:
        assert f"{name} must be" in refuse(**{name: value})


@pytest.mark.parametrize("name", ["request_timeout", "exit_timeout", "stalled_after", "flush_timeout"])
@pytest.mark.parametrize("value", [10**400, 10**30, 1e300, 1e10], ids=["int", "1e30", "1e300", "1e10"])
def test_seconds_that_no_clock_can_count_are_refused(name, value):
    """A timeout that would overflow a lock's own is refused at once, not at the first wait (invariant 11)."""
    assert f"{name} must be" in refuse(**{name: value})


@pytest.mark.parametrize(
    ("name", "zero"),
    [("exit_timeout", True), ("flush_timeout", True), ("request_timeout", False), ("stalled_after", False)],
)
def test_zero_seconds_are_taken_where_they_mean_something(name, zero):
    """Zero is "do not wait" for flush and exit; a request needs some time."""
    if zero:
        assert getattr(resolve(**{name: 0}), name) == 0.0
    else:
        assert f"{name} must be a positive number" in refuse(**{name: 0})


@pytest.mark.parametrize("name", ["max_in_flight", "max_pending"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 32.0, "32", True, None])
def test_a_count_that_is_none_is_refused(name, value):
    """A count is a whole number from 1."""
    assert f"{name} must be a whole number from 1" in refuse(**{name: value})


def test_counts_have_bounds():
    """At most 1,024 requests in flight; any number pending."""
    assert resolve(max_in_flight=1).max_in_flight == 1
    assert resolve(max_in_flight=1024).max_in_flight == 1024
    assert "to 1024" in refuse(max_in_flight=1025)
    assert resolve(max_pending=10**12).max_pending == 10**12


@pytest.mark.parametrize("name", ["base", "cap", "retry_after_cap", "activity_cap"])
@pytest.mark.parametrize("value", [0, *NO_NUMBERS], ids=repr)
def test_a_retry_policy_is_checked_when_it_is_made(name, value):
    """A wait that is no positive number of seconds is refused where it is written."""
    with pytest.raises(ConfigurationError, match=f"retry.{name} must be a positive number"):
        RetryPolicy(**{name: value})


@pytest.mark.parametrize("value", [5, "fast", {}, {"base": 1}, object()])
def test_retry_is_a_retry_policy(value):
    """Anything but a `RetryPolicy` is refused."""
    assert "retry must be a RetryPolicy" in refuse(retry=value)


@pytest.mark.parametrize("value", ["", "Power", "disk", None, True, 1])
def test_durability_is_one_of_two_words(value):
    """There are two durabilities, and no third by mistake."""
    assert "durability must be 'process' or 'power'" in refuse(durability=value)


def test_power_is_a_durability():
    """`durability="power"` is the other one."""
    assert resolve(durability="power").durability == "power"


@pytest.mark.parametrize("value", [timedelta(0), timedelta(minutes=59), -timedelta(days=1), 35, "35 days"])
def test_delivered_activities_are_kept_for_an_hour_at_least(value):
    """The audit trail is at least one hour long."""
    assert "keep_delivered must be" in refuse(keep_delivered=value)


def test_how_long_delivered_activities_are_kept():
    """From an hour on any length is taken; `None` is the default of 35 days."""
    assert resolve(keep_delivered=timedelta(hours=1)).keep_delivered == timedelta(hours=1)
    assert resolve(keep_delivered=None).keep_delivered == timedelta(days=35)


@pytest.mark.parametrize("value", [1, 0, "yes", "false", []])
def test_drain_is_true_or_false(value):
    """A word or a number for `drain` is refused: "false" would be true."""
    assert "drain must be True or False" in refuse(drain=value)


@pytest.mark.parametrize("name", ["on_record_error", "on_rejected", "on_stalled"])
def test_a_callback_is_callable(name):
    """A callback that cannot be called is refused at construction, not at the first failure."""
    assert f"{name} must be callable" in refuse(**{name: "print"})
    assert getattr(resolve(**{name: print}), name) is print


@pytest.mark.parametrize("value", [object(), "transport", httpx.HTTPTransport])
def test_a_transport_is_an_asynchronous_one(value):
    """A synchronous transport, or anything else, is refused."""
    assert "transport must be an httpx.AsyncBaseTransport" in refuse(transport=value)


@pytest.mark.parametrize(
    "value",
    [
        "proxy.example:3128",
        f"user:{SECRET}@proxy.example:3128",
        f"ftp://user:{SECRET}@proxy.example",
        f"http://user:{SECRET}@proxy.example:port",
        "",
        7,
        b"http://proxy.example",
    ],
)
def test_a_proxy_is_checked_at_once(value):
    """A proxy that httpx could not use is refused at construction, without its password (invariant 9)."""
    shown = refuse(proxy=value)
    assert "proxy must be" in shown
    assert SECRET not in shown


@pytest.mark.parametrize(
    "value",
    ["http://proxy.example:3128", httpx.URL("https://proxy.example"), httpx.Proxy("http://proxy.example")],
)
def test_a_proxy_is_a_url(value):
    """Text, URL and httpx's own object name a proxy."""
    assert isinstance(resolve(proxy=value).proxy, httpx.Proxy)


@pytest.mark.parametrize("value", [None, "/etc/ssl/ca.pem", 1, 0])
def test_verify_is_checked_at_once(value):
    """What is neither a boolean nor a context is refused: a file that is not there would stop delivery."""
    assert "verify must be True, False or an ssl.SSLContext" in refuse(verify=value)


def test_verify_may_be_a_context():
    """A context of one's own is given to httpx as it is."""
    context = ssl.create_default_context()
    assert resolve(verify=context).verify is context
    assert resolve(verify=False).verify is False


@pytest.mark.parametrize("value", ["", "x" * 401, "a\0", 7, b"TYPE"])
def test_an_activity_type_is_checked_like_any_id(value):
    """The default activity type follows the rule for IDs, as a `ConfigurationError`."""
    assert "activity_type_id" in refuse(activity_type_id=value)


def test_embedded_is_true_or_false():
    """Whose file the outbox is in is said plainly: nothing else is taken for True."""
    assert "embedded must be True or False" in refuse(embedded="app.db")


@pytest.mark.parametrize(
    "window",
    [3600, timedelta(0), timedelta(hours=-1), timedelta(hours=7), timedelta(days=2), timedelta(seconds=0.5)],
)
def test_a_window_divides_the_day(window):
    """Windows are counted from midnight UTC, so that one must end there."""
    assert "divides 24 hours" in refuse(coalesce=window)


def test_a_window_is_no_longer_than_the_audit_trail():
    """What stands for others must still be there when they ask for it."""
    assert "keep_delivered" in refuse(coalesce=timedelta(hours=2), keep_delivered=timedelta(hours=1))


def test_an_option_that_does_not_exist_is_a_type_error(tmp_path):
    """A misspelt option is noticed by Python itself."""
    with pytest.raises(TypeError, match="activity_tokn"):
        PerQueue(tmp_path / "a.db", activity_tokn="x")


@pytest.mark.parametrize("client", [AsyncPerClient, PerClient])
@pytest.mark.parametrize(
    "given",
    [{"activity_token": f"{SECRET} x"}, {"base_url": "http://api.useper.com"}, {"request_timeout": 0}],
)
def test_clients_check_their_options_too(client, given):
    """The bare clients refuse the same mistakes, and show no token (invariant 9)."""
    with pytest.raises(ConfigurationError) as caught:
        client(**given)
    assert SECRET not in str(caught.value)


def test_nothing_is_created_when_an_option_is_wrong(tmp_path):
    """A queue that cannot be made leaves no file behind."""
    with pytest.raises(ConfigurationError):
        PerQueue(tmp_path / "activities.db", activity_token="a b")
    assert list(tmp_path.iterdir()) == []
