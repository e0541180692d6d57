"""Which servers are trusted, and what to say about one that is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


def tls_context(*, verify: ssl.SSLContext | bool) -> ssl.SSLContext:
    """Return what httpx makes of the option ``verify``, without its import, which takes 100 ms."""
    if not isinstance(verify, bool):
        return verify
    import ssl

    import certifi

    if verify:
        context = ssl.create_default_context(cafile=certifi.where())
        # From the environment, as SSLKEYLOGFILE: whoever reads that file could read the token.
        context.keylog_filename = None  # type: ignore[assignment]
        return context
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def distrust(error: BaseException | None) -> str | None:
    """Say what is wrong with the server's certificate, if that is what made a request fail."""
    import ssl

    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    return (
        f"the server's certificate is not trusted ({error.verify_message.rstrip('.')}), so nothing was sent"
        " to it. If a proxy with a certificate authority of its own stands before Per:"
        " verify=ssl.create_default_context(cafile=...)"
    )
