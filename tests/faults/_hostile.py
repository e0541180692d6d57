"""What a broken or malicious server, or the network before it, can do to a request."""

import time
import zlib
from functools import cache

from tests.faults._raw_server import answer_to, user_of

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def _count(wire, request):
    wire.server.accepted[user_of(request)] += 1


def _for_ever(wire, piece, pause=0.0):
    while not wire.server.stopped.wait(pause):
        wire.send(piece)
    return True


def silence(wire, request):
    """Never answer."""
    return wire.server.stopped.wait()


def reset_before_the_answer(wire, request):
    """Reset the connection, the activity not counted."""
    wire.reset()
    return True


def reset_after_the_activity_counted(wire, request):
    """Reset the connection, the activity counted."""
    _count(wire, request)
    wire.reset()
    return True


def reset_within_the_answer(wire, request):
    """Count the activity, and break off in the middle of the answer."""
    _count(wire, request)
    wire.send(answer_to(request)[:-20])
    time.sleep(0.02)
    wire.reset()
    return True


def half_a_body(wire, request):
    """Count the activity, and end the connection in the middle of the answer."""
    _count(wire, request)
    wire.send(answer_to(request)[:-20])
    return True


def a_byte_every_quarter_of_a_second(wire, request):
    """Answer slowly."""
    _count(wire, request)
    for byte in answer_to(request):
        wire.send(bytes([byte]))
        if wire.server.stopped.wait(0.25):
            break
    return True


def a_body_byte_every_quarter_of_a_second(wire, request):
    """Answer at once, but for the body."""
    _count(wire, request)
    head, _, body = answer_to(request).partition(b"\r\n\r\n")
    wire.send(head + b"\r\n\r\n")
    for byte in body:
        wire.send(bytes([byte]))
        if wire.server.stopped.wait(0.25):
            break
    return True


def headers_for_ever(wire, request):
    """Send header after header."""
    wire.send(HEAD)
    return _for_ever(wire, b"X-Filler: %s\r\n" % (b"x" * 1000))


def slow_headers_for_ever(wire, request):
    """Send header after header, at leisure."""
    wire.send(HEAD)
    return _for_ever(wire, b"X-Filler: x\r\n", pause=0.05)


def one_header_for_ever(wire, request):
    """Send a header that does not end."""
    wire.send(HEAD + b"X-Filler: ")
    return _for_ever(wire, b"x" * 65536)


def interim_answers_for_ever(wire, request):
    """Send one 103 after the other."""
    return _for_ever(wire, b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)


def chunks_for_ever(wire, request):
    """Send a body of tiny chunks that does not end, slowly."""
    wire.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    return _for_ever(wire, b"1\r\n \r\n", pause=0.05)


def a_chunk_header_for_ever(wire, request):
    """Send a chunk whose extension does not end."""
    wire.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;x=")
    return _for_ever(wire, b"x" * 65536)


def a_huge_body(wire, request):
    """Send 200 MB that begin like an answer."""
    wire.send(HEAD + b"Content-Length: 200000000\r\n\r\n" + b'{"ok": true, "result": {"transactionId": "T"}}')
    return _for_ever(wire, b" " * 65536)


def a_length_beyond_all_bounds(wire, request):
    """Promise 10**30 bytes."""
    wire.send(HEAD + b"Content-Length: %d\r\n\r\n" % 10**30)
    return _for_ever(wire, b" " * 65536)


@cache
def bomb(megabytes=200):
    """Return what `a_gzip_bomb` sends; it takes a second or two to make."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: in gzip's format
    packed = packer.compress(b'{"ok": true, "result": {"transactionId": "T"}}')
    for _ in range(megabytes):
        packed += packer.compress(b" " * 1_000_000)
    return packed + packer.flush()


def a_gzip_bomb(wire, request, how=b"Content-Encoding: gzip"):
    """Send 200 kB that unpack to 200 MB of a perfect answer."""
    wire.send(HEAD + b"%s\r\nContent-Length: %d\r\n\r\n" % (how, len(bomb())) + bomb())


def a_gzip_bomb_in_disguise(wire, request):
    """Send the same, without saying that it is packed."""
    return a_gzip_bomb(wire, request, b"X-Encoding: gzip")


def garbage(wire, request):
    """Send what is not HTTP."""
    wire.send(b"\x16\x03\x01\x02\x00" * 50)
    return True


HOSTILE = [
    silence,
    reset_before_the_answer,
    reset_after_the_activity_counted,
    reset_within_the_answer,
    half_a_body,
    a_byte_every_quarter_of_a_second,
    a_body_byte_every_quarter_of_a_second,
    headers_for_ever,
    slow_headers_for_ever,
    one_header_for_ever,
    interim_answers_for_ever,
    chunks_for_ever,
    a_chunk_header_for_ever,
    a_huge_body,
    a_length_beyond_all_bounds,
    a_gzip_bomb,
    a_gzip_bomb_in_disguise,
    garbage,
]
