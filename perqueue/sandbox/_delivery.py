"""Answers on the wire: whole, late, in part, or not at all."""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Final, NoReturn

from perqueue.sandbox._aiohttp import web
from perqueue.sandbox._bad_lines import (
    CloseAfterAnswer,
    Disconnect,
    Drip,
    HalfBody,
    Hang,
    HugeBody,
    Latency,
    ResetAfterAccepting,
    ResetBeforeAccepting,
)
from perqueue.sandbox._fault import Fault
from perqueue.sandbox._spoil import half, spoil
from perqueue.sandbox._wire import Answer

_CHUNK: Final = b" " * 65_536
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger: on, 0 seconds

Hold = Callable[[float | None], Awaitable[None]]


class Ending(Enum):
    """How a connection ends on which no (more) answer comes."""

    CLOSE = auto()
    RESET = auto()


def whole(answer: Answer) -> web.Response:
    """Make the answer an HTTP response."""
    headers = {"Content-Type": answer.content_type, **answer.headers}
    return web.Response(body=answer.body, status=answer.status, headers=headers)


async def deliver(
    request: web.BaseRequest, fault: Fault, true: Answer, hold: Hold
) -> web.StreamResponse | Ending:
    """Answer as this fault does; `hold` waits for its seconds, or until requests are released."""
    outcome: web.StreamResponse | Ending
    match fault:
        case ResetBeforeAccepting() | ResetAfterAccepting():
            outcome = Ending.RESET
        case Disconnect():
            outcome = Ending.CLOSE
        case Hang():
            await hold(fault.seconds)
            outcome = whole(true) if fault.accept else Ending.CLOSE
        case Latency():
            await asyncio.sleep(fault.seconds)
            outcome = whole(true)
        case HalfBody():
            outcome = await _send(request, true, half(true.body))
        case CloseAfterAnswer():
            outcome = await _send(request, true, true.body)
        case Drip():
            outcome = await _drip(request, true, fault.interval)
        case HugeBody():
            outcome = await _pad(request, true, fault.size)
        case _:
            outcome = whole(spoil(fault, true))
    return outcome


async def end(request: web.BaseRequest, ending: Ending) -> NoReturn:
    """End the connection; its loss then cancels this handler, so that nothing answers."""
    transport = request.transport
    if transport is not None and ending is Ending.RESET:
        connection: socket.socket = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()
    elif transport is not None:
        transport.close()
    await asyncio.Event().wait()
    raise AssertionError("only cancellation ends this")  # pragma: no cover


async def _begin(request: web.BaseRequest, answer: Answer, length: int) -> web.StreamResponse:
    headers = {"Content-Type": answer.content_type, **answer.headers}
    stream = web.StreamResponse(status=answer.status, headers=headers)
    stream.content_length = length
    await stream.prepare(request)
    return stream


async def _send(request: web.BaseRequest, answer: Answer, part: bytes) -> Ending:
    stream = await _begin(request, answer, len(answer.body))
    await stream.write(part)
    return Ending.CLOSE


async def _drip(request: web.BaseRequest, answer: Answer, interval: float) -> web.StreamResponse:
    stream = await _begin(request, answer, len(answer.body))
    for byte in answer.body:
        await asyncio.sleep(interval)
        await stream.write(bytes([byte]))
    return stream


async def _pad(request: web.BaseRequest, answer: Answer, size: int) -> web.StreamResponse:
    missing = max(0, size - len(answer.body))
    stream = await _begin(request, answer, len(answer.body) + missing)
    await stream.write(answer.body)
    while missing:
        piece = _CHUNK[:missing]
        await stream.write(piece)
        missing -= len(piece)
    return stream
