"""Every option: where it comes from, what it may be, and what it means. Validated once, then frozen."""

from __future__ import annotations

import ipaddress
import os
import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from perqueue._activity import checked_id
from perqueue._address import DatabaseURL, is_database_url
from perqueue._place import real_path
from perqueue.exceptions import ConfigurationError, InvalidActivity, OutboxError

if TYPE_CHECKING:
    import ssl

    import httpx
    from opentelemetry.metrics import MeterProvider

    from perqueue._activity import Activity
    from perqueue._stats import Stats

Token = str | Callable[[], str]

DEFAULT_BASE_URL = "https://api.useper.com"
_TOKEN_CHARACTERS = frozenset(string.ascii_letters + string.digits + string.punctuation)
_MOST_SECONDS = 10**9
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long to wait after a failure. All in seconds.

    Waits are drawn with full jitter: uniformly between 0 and ``base * 2 ** (failures - 1)``, capped.
    """

    base: float = 0.5
    """Upper end of the first wait."""
    cap: float = 60.0
    """Longest wait between two probes of an outage."""
    retry_after_cap: float = 300.0
    """Longest ``Retry-After`` that is obeyed; a longer one is cut to this."""
    activity_cap: float = 900.0
    """Longest wait of one activity that keeps failing while others get through."""

    def __post_init__(self) -> None:
        for name in ("base", "cap", "retry_after_cap", "activity_cap"):
            _seconds(f"retry.{name}", getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSettings:
    """What both clients and the queue need to speak to Per."""

    activity_token: Token | None = field(repr=False, default=None)
    reporting_token: Token | None = field(repr=False, default=None)
    activity_type_id: str | None = None
    base_url: str = DEFAULT_BASE_URL
    request_timeout: float = 10.0
    proxy: httpx.Proxy | None = field(repr=False, default=None)
    verify: ssl.SSLContext | bool = True
    transport: httpx.AsyncBaseTransport | None = None

    @property
    def origin(self) -> str:
        """Scheme, host and port of the base URL: what an outbox belongs to."""
        return origin_of(self.base_url)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(ClientSettings):
    """Every option of a :class:`perqueue.PerQueue`, as it is in force."""

    outbox: Path | DatabaseURL
    drain: bool = True
    embedded: bool = False
    max_in_flight: int = 32
    durability: Literal["process", "power"] = "process"
    coalesce: timedelta | None = None
    keep_delivered: timedelta = timedelta(days=35)
    max_pending: int = 10_000_000
    flush_timeout: float | None = 30.0
    exit_timeout: float = 2.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    stalled_after: float = 300.0
    on_record_error: Callable[[OutboxError], object] | None = None
    on_rejected: Callable[[Activity], object] | None = None
    on_stalled: Callable[[Stats], object] | None = None
    meter_provider: MeterProvider | None = None


def resolve_client_settings(environ: Mapping[str, str] = os.environ, **options: Any) -> ClientSettings:
    """Validate the options of a client; what is None comes from the environment.

    Raises :class:`ConfigurationError`.
    """
    return ClientSettings(**_client_options(environ, options))


def resolve_settings(environ: Mapping[str, str] = os.environ, **options: Any) -> Settings:
    """Validate the options of a queue; what is None comes from the environment, else the default.

    Raises :class:`ConfigurationError`.
    """
    resolved = _client_options(environ, options)
    resolved["outbox"] = outbox_place(options["outbox"] or environ.get("PERQUEUE_OUTBOX"))
    drain = options["drain"]
    if drain is None:
        drain = flag(environ.get("PERQUEUE_DRAIN") or "true")
    resolved["drain"] = _bool("drain", drain)
    if resolved["drain"] and resolved["activity_token"] is None:
        message = (
            "activity_token is missing: pass it or set PER_ACTIVITY_TOKEN;"
            " a process that only records, for another to deliver, says drain=False"
        )
        raise ConfigurationError(message)
    resolved["embedded"] = _bool("embedded", options["embedded"])
    if resolved["embedded"] and isinstance(resolved["outbox"], DatabaseURL):
        message = "embedded is for SQLite files: in PostgreSQL, record(connection=...) works without it"
        raise ConfigurationError(message)
    resolved["max_in_flight"] = _count("max_in_flight", options["max_in_flight"], 1024)
    resolved["max_pending"] = _count("max_pending", options["max_pending"])
    if options["durability"] not in ("process", "power"):
        message = "durability must be 'process' or 'power'"
        raise ConfigurationError(message)
    resolved["durability"] = options["durability"]
    keep = timedelta(days=35) if options["keep_delivered"] is None else options["keep_delivered"]
    if not isinstance(keep, timedelta) or keep < timedelta(hours=1):
        message = "keep_delivered must be a timedelta of at least one hour"
        raise ConfigurationError(message)
    resolved["keep_delivered"] = keep
    resolved["coalesce"] = coalesce = options["coalesce"]
    if coalesce is not None and not _divides_a_day(coalesce, keep):
        message = "coalesce must be a timedelta that divides 24 hours, at most as long as keep_delivered"
        raise ConfigurationError(message)
    timeout = options["flush_timeout"]
    resolved["flush_timeout"] = None if timeout is None else _seconds("flush_timeout", timeout, zero=True)
    resolved["exit_timeout"] = _seconds("exit_timeout", options["exit_timeout"], zero=True)
    resolved["stalled_after"] = _seconds("stalled_after", options["stalled_after"])
    retry = RetryPolicy() if options["retry"] is None else options["retry"]
    if not isinstance(retry, RetryPolicy):
        message = "retry must be a RetryPolicy"
        raise ConfigurationError(message)
    resolved["retry"] = retry
    for name in ("on_record_error", "on_rejected", "on_stalled"):
        if options[name] is not None and not callable(options[name]):
            message = f"{name} must be callable"
            raise ConfigurationError(message)
        resolved[name] = options[name]
    resolved["meter_provider"] = _meter_provider(options["meter_provider"])
    return Settings(**resolved)


def checked_token(name: str, token: object) -> str:
    """Return the token if it can stand in a header; the exception's text never shows it."""
    if not isinstance(token, str):
        message = f"{name} must be a str or a callable that returns one, not {type(token).__name__}"
        raise ConfigurationError(message)
    if not token or len(token) > 4096 or not _TOKEN_CHARACTERS.issuperset(token):
        message = f"{name} must be 1 to 4096 printable ASCII characters without spaces or line breaks"
        raise ConfigurationError(message)
    return token


def origin_of(url: str) -> str:
    """Return ``scheme://host[:port]`` of a checked base URL, in lower case and without a default port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    default = {"https": 443, "http": 80}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if parts.port in (None, default) else f":{parts.port}")


def checked_timeout(name: str, value: object) -> float | None:
    """Return a timeout in seconds (0 allowed), or None for no limit."""
    return None if value is None else _seconds(name, value, zero=True)


def _client_options(environ: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    resolved: dict[str, Any] = {}
    for name in ("activity_token", "reporting_token"):
        token = options[name] if options[name] is not None else environ.get(f"PER_{name.upper()}") or None
        resolved[name] = token if token is None or callable(token) else checked_token(name, token)
    kind = options["activity_type_id"]
    if kind is None:
        kind = environ.get("PER_ACTIVITY_TYPE_ID") or environ.get("ACTIVITY_TYPE_ID")
    try:
        resolved["activity_type_id"] = None if kind is None else checked_id("activity_type_id", kind)
    except InvalidActivity as error:
        raise ConfigurationError(str(error)) from None
    resolved["base_url"] = checked_base_url(
        options["base_url"] or environ.get("PER_BASE_URL") or DEFAULT_BASE_URL
    )
    resolved["request_timeout"] = _seconds("request_timeout", options["request_timeout"])
    resolved["proxy"] = _proxy(options["proxy"])
    resolved["verify"] = _verify(options["verify"])
    resolved["transport"] = transport = options["transport"]
    if transport is not None and not hasattr(transport, "handle_async_request"):
        message = "transport must be an httpx.AsyncBaseTransport"
        raise ConfigurationError(message)
    return resolved


def checked_base_url(url: object) -> str:
    """Return the address of a Per without a slash at its end, or raise :class:`ConfigurationError`."""
    if not isinstance(url, str) or not url.isascii() or not url.isprintable() or " " in url:
        message = "base_url must be an ASCII URL without spaces (an international host name: in punycode)"
        raise ConfigurationError(message)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or parts.scheme not in ("https", "http"):
        message = "base_url must look like https://api.useper.com"
        raise ConfigurationError(message)
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        message = "base_url must have no user name, password, query or fragment"
        raise ConfigurationError(message)
    if parts.scheme == "http" and not is_loopback(host or ""):
        message = "base_url must be https: plain http would show the token to the network (loopback excepted)"
        raise ConfigurationError(message)
    return url.rstrip("/")


def is_address(url: str) -> bool:
    """Tell whether a URL's host needs no look-up."""
    try:
        ipaddress.ip_address(urlsplit(url).hostname or "")
    except ValueError:
        return False
    return True


def _proxy(proxy: object) -> httpx.Proxy | None:
    if proxy is None:
        return None
    import httpx

    if isinstance(proxy, httpx.Proxy):
        return proxy
    try:
        return httpx.Proxy(proxy)  # type: ignore[arg-type]  # anything else is an error of its own
    except Exception:  # noqa: BLE001 - whose text may hold the proxy's password
        message = "proxy must be an httpx.Proxy, or a URL like http://proxy.example:3128"
        raise ConfigurationError(message) from None


def _verify(verify: object) -> ssl.SSLContext | bool:
    if isinstance(verify, bool):
        return verify
    import ssl

    if isinstance(verify, ssl.SSLContext):
        return verify
    message = "verify must be True, False or an ssl.SSLContext (ssl.create_default_context(cafile=...))"
    raise ConfigurationError(message)


def _meter_provider(provider: MeterProvider | None) -> MeterProvider | None:
    if provider is None:
        return None
    if not callable(getattr(provider, "get_meter", None)):
        message = "meter_provider must be an opentelemetry.metrics.MeterProvider"
        raise ConfigurationError(message)
    try:
        import opentelemetry.metrics  # noqa: F401 - as long as somebody is there to be told
    except ImportError:
        message = "meter_provider needs OpenTelemetry's API: pip install 'useper-perqueue[otel]'"
        raise ConfigurationError(message) from None
    return provider


def is_loopback(host: str) -> bool:
    """Tell whether a host names this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def outbox_place(outbox: object) -> Path | DatabaseURL:
    """Return where the option ``outbox`` says; raise :class:`ConfigurationError`."""
    return DatabaseURL(str(outbox)) if is_database_url(outbox) else outbox_path(outbox)


_NAMES_A_DATABASE = re.compile(r"postgres(ql)?:|\s*(host|hostaddr|dbname|user|password|service)\s*=")
"""What was meant for libpq, and may hold a password, which the name of a file would show."""


def outbox_path(outbox: object) -> Path:
    """Return the absolute path that the option ``outbox`` names; raise :class:`ConfigurationError`."""
    if outbox is None or outbox == "":
        message = "outbox is missing: pass the path of a file of its own, or set PERQUEUE_OUTBOX"
        raise ConfigurationError(message)
    if not isinstance(outbox, str | os.PathLike):
        message = f"outbox must be a path, not {type(outbox).__name__}"
        raise ConfigurationError(message)
    text = os.fspath(outbox)
    if not isinstance(text, str) or "\0" in text or text == ":memory:" or text.startswith("file:"):
        message = "outbox must be the path of a file on disk"
        raise ConfigurationError(message)
    if "://" in text or _NAMES_A_DATABASE.match(text):
        message = "outbox must be the path of a file on disk, or a postgresql:// URL"
        raise ConfigurationError(message)
    try:
        # The real path: SQLite names -wal and -shm by it, and so must the drain's lock be.
        return real_path(Path(text).expanduser().absolute())
    except ConfigurationError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # no such user, no working directory, a surrogate
        message = f"outbox must be the path of a file on disk: {error}"
        raise ConfigurationError(message) from None


def _divides_a_day(window: object, longest: timedelta) -> bool:
    if not isinstance(window, timedelta) or not timedelta(seconds=1) <= window <= longest:
        return False
    return timedelta(days=1) % window == timedelta(0) and not window.microseconds


def _seconds(name: str, value: object, *, zero: bool = False) -> float:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    # Written so that NaN fails too. Locks and event loops overflow beyond about 300 years.
    if not (ok and 0 <= value <= _MOST_SECONDS) or (value == 0 and not zero):  # type: ignore[operator]  # a number
        kind = "non-negative" if zero else "positive"
        message = f"{name} must be a {kind} number of seconds, at most 10**9"
        raise ConfigurationError(message)
    return float(value)  # type: ignore[arg-type]


def _count(name: str, value: object, most: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most and value > most):
        message = f"{name} must be a whole number from 1" + (f" to {most}" if most else "")
        raise ConfigurationError(message)
    return value


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        message = f"{name} must be True or False"
        raise ConfigurationError(message)
    return value


def flag(text: str) -> bool:
    """Return what ``PERQUEUE_DRAIN`` says, or raise :class:`ConfigurationError`."""
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        message = "PERQUEUE_DRAIN must be true or false"
        raise ConfigurationError(message)
    return word in _TRUE
