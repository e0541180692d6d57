"""Reading a server's certificate: whose it is, who issued it, how long it is valid; trusted or not."""

from __future__ import annotations

import ssl
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perqueue._answers import presentable

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

_SOON = 14 * 86400.0
"""Seconds before its end at which a certificate ought to have been renewed; of a short-lived one a tenth."""
_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which Python has no name."""
_NAMES = ("DNS", "IP Address")
"""Kinds of alternative names that a host can have; others need not even be texts."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says of itself."""

    issuer: str
    names: tuple[str, ...]
    begins: float
    ends: float
    """Seconds since the epoch, both."""

    def ends_soon(self, now: float) -> bool:
        """Tell whether it should have been renewed by now."""
        return self.ends - now < min(_SOON, (self.ends - self.begins) / 10)

    @property
    def until(self) -> str:
        """Return the day of its end (UTC)."""
        return time.strftime("%Y-%m-%d", time.gmtime(self.ends))


def read(tls: ssl.SSLSocket) -> Certificate:
    """Return the certificate of a connection over which it was verified."""
    said: Any = tls.getpeercert()
    issuer = {name: value for part in said.get("issuer", ()) for name, value in part}
    known = [issuer.get(name) for name in ("commonName", "organizationName", "organizationalUnitName")]
    return Certificate(
        presentable(", ".join(dict.fromkeys(text for text in known if text)), longest=100) or "nobody",
        tuple(
            presentable(name, longest=60) for kind, name in said.get("subjectAltName", ()) if kind in _NAMES
        ),
        ssl.cert_time_to_seconds(said["notBefore"]),
        ssl.cert_time_to_seconds(said["notAfter"]),
    )


def read_untrusted(connect: Callable[[], socket.socket], host: str) -> Certificate:
    """Return the certificate of a server that is not to be trusted; nothing is sent to it.

    Python parses only what it has verified. So the server's own certificate is fetched, then taken for the
    one authority, whatever its dates and its name.
    """
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    with closing(connect()) as tcp, blind.wrap_socket(tcp, server_hostname=host) as tls:
        encoded = tls.getpeercert(binary_form=True)
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    trusting.load_verify_locations(cadata=encoded or b"")
    with closing(connect()) as tcp, trusting.wrap_socket(tcp, server_hostname=host) as tls:
        return read(tls)
