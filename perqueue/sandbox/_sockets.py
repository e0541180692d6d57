"""Sockets of a port that is to be had again and again."""

import socket


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, and does not listen; port 0 takes a free one."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Linux lets several sockets with this option share a port as long as none of them listens.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound
