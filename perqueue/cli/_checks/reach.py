"""The way to Per: name, port, TLS. Nothing is sent over it yet, tokens least of all."""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from perqueue._outbox.finding import ok, problem, warning
from perqueue._settings import is_address
from perqueue.cli import _print
from perqueue.cli._checks import certificate

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from perqueue._outbox.finding import Finding
    from perqueue.cli._checks.deadline import Deadline

STEP = 3.0
"""Seconds for each step on the way."""
_MOST_ADDRESSES = 4
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_IMPATIENCE = 0.5
"""Seconds for an address when there are others to try."""


class Unreachable(Exception):
    """The way ends here."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where Per is to be found."""

    base_url: str
    context: ssl.SSLContext
    """Whom to trust."""
    environ: Mapping[str, str]

    @property
    def host(self) -> str:
        """The host's name or address."""
        return urlsplit(self.base_url).hostname or ""

    @property
    def is_tls(self) -> bool:
        """Whether it is reached over TLS."""
        return self.base_url.startswith("https:")

    @property
    def port(self) -> int:
        """The port."""
        return urlsplit(self.base_url).port or (443 if self.is_tls else 80)

    def blocked(self, remedy: str) -> str:
        """Return a remedy for a way that is blocked, with what is easily overlooked."""
        given = next((name for name in _PROXIES if self.environ.get(name)), None)
        if given is None:
            return remedy
        heed = f"{given} is set, which perqueue does not heed: give the program proxy=…"
        return f"{heed}. Else: {remedy}"


def reach(target: Target, deadline: Deadline) -> Generator[Finding, None, None]:
    """Go the way step by step; raises :class:`Unreachable` where it ends."""
    addresses = yield from _look_up(target, deadline)
    address = yield from _connect(target, addresses, deadline)
    if target.is_tls:
        yield _secure(target, address, deadline)
    else:
        yield ok("tls", "none: plain http, which does not leave this machine")


def _look_up(target: Target, deadline: Deadline) -> Generator[Finding, None, list[str]]:
    host = target.host
    if is_address(target.base_url):
        return [host]
    began = time.monotonic()
    remedy = target.blocked("look at this machine's network and DNS (/etc/resolv.conf); nothing is lost")
    try:
        found = deadline.run(lambda: socket.getaddrinfo(host, target.port, type=socket.SOCK_STREAM), STEP)
    except TimeoutError:
        text = f"the DNS has not said within {STEP:g} s where {host} is"
        raise Unreachable(problem("name", text, remedy)) from None
    except (OSError, UnicodeError) as error:
        text = f"{host} cannot be looked up: {error.strerror if isinstance(error, OSError) else error}"
        raise Unreachable(problem("name", text, remedy)) from None
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    more = f" and {len(addresses) - 1} more" if len(addresses) > 1 else ""
    yield ok("name", f"{host} is {addresses[0]}{more} ({_ms(began)})")
    return addresses


def _connect(target: Target, addresses: list[str], deadline: Deadline) -> Generator[Finding, None, str]:
    """Return the first address that answers."""
    failures: list[str] = []
    silent: list[str] = []
    for address in addresses[:_MOST_ADDRESSES]:
        patience = STEP if address == addresses[:_MOST_ADDRESSES][-1] else _IMPATIENCE
        began = time.monotonic()
        try:
            _open(address, target.port, deadline.left(patience)).close()
        except TimeoutError:
            silent.append(f"{address} port {target.port} does not answer within {patience:g} s")
            continue
        except OSError as error:
            failures.append(f"{address} port {target.port}: {error.strerror or error}")
            continue
        yield ok("port", f"{address} port {target.port} answers ({_ms(began)})")
        if silent:  # one that fails at once, for want of IPv6 say, costs nothing
            remedy = "delivery tries the next address after 0.25 s; mend the route, or IPv6"
            yield warning("port", "; ".join(silent), remedy)
        return address
    remedy = "Per is down, a firewall is in the way, or PER_BASE_URL is wrong: nothing is lost"
    raise Unreachable(problem("port", "; ".join(silent + failures), target.blocked(remedy)))


def _open(address: str, port: int, seconds: float) -> socket.socket:
    return socket.create_connection((address, port), timeout=seconds)


def _secure(target: Target, address: str, deadline: Deadline) -> Finding:
    """Look at the certificate, as a program that delivers would."""
    connect = partial(_open, address, target.port, deadline.left(STEP))
    began = time.monotonic()

    def shake_hands() -> tuple[str, certificate.Certificate]:
        with (
            closing(connect()) as tcp,
            target.context.wrap_socket(tcp, server_hostname=target.host) as tls,
        ):
            return tls.version() or "TLS", certificate.read(tls)

    try:
        version, read = deadline.run(shake_hands, STEP)
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(_distrusted(target, error, connect, deadline)) from None
    except TimeoutError:
        text = f"{address} takes connections, and says nothing of TLS within {STEP:g} s"
        remedy = target.blocked("a firewall, or a server that hangs; nothing is lost")
        raise Unreachable(problem("tls", text, remedy)) from None
    except (OSError, ValueError) as error:
        why = error.reason if isinstance(error, ssl.SSLError) else str(error)
        text = f"what answers at {address} port {target.port} does not speak TLS as Per would: {why}"
        remedy = target.blocked("look for a captive portal or a proxy in between, or a wrong port")
        raise Unreachable(problem("tls", text, remedy)) from None
    return _judged(version, read, began)


def _judged(version: str, read: certificate.Certificate, began: float) -> Finding:
    took = _ms(began)
    text = f"{version}, certificate from {read.issuer}, valid until {read.until} ({took})"
    if read.ends_soon(time.time()):
        left = _print.age(read.ends - time.time())
        remedy = "whoever runs that server must renew it: nothing is delivered after that"
        return warning("tls", f"{text}: ends in {left}", remedy)
    return ok("tls", text)


def _distrusted(
    target: Target,
    error: ssl.SSLCertVerificationError,
    connect: Callable[[], socket.socket],
    deadline: Deadline,
) -> Finding:
    text = f"the certificate is not trusted: {error.verify_message.rstrip('.')}"
    try:
        read = deadline.run(lambda: certificate.read_untrusted(connect, target.host), STEP)
    except (OSError, ValueError):
        pass
    else:
        names = ", ".join(read.names[:3]) or "no name"
        text += f". It is for {names}, from {read.issuer}, valid until {read.until}"
    remedy = (
        "if a proxy of your own stands before Per, its authority is missing: verify=… in the program,"
        " --ca-file here. If the clock is wrong, set it. Else somebody poses as Per: nothing was sent"
    )
    return problem("tls", text, remedy)


def _ms(began: float) -> str:
    return f"{(time.monotonic() - began) * 1000:,.0f} ms"
