"""Attacks that need no key: connections that send nothing, too much, or too slowly, and clients that do not read.

Each ends soon after the server has closed what it closes, at the default limits within some 20 s.
"""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from tests.abuse.target import ROUND_LIMIT_S, Attack, Ends, Target

MIB = 1024**2
SILENT = 1500
PAUSE_S = 0.5
LEAVE_AFTER_S = 5.0
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(target: Target, limit: int = 65536) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=limit)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def end_of(reader: asyncio.StreamReader) -> str:
    """The status of what the server answered, or how it closed."""
    try:
        async with asyncio.timeout(ROUND_LIMIT_S):
            line = await reader.readline()
            await reader.read()
    except TimeoutError:
        return "timeout"
    except (OSError, ValueError):
        return "reset"
    return line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else "reset"


async def flood(writer: asyncio.StreamWriter, piece: bytes, most: int) -> None:
    """Send a piece again and again, to `most` bytes or until the server closes."""
    sent = 0
    try:
        while sent < most and not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
    except OSError:
        pass


async def dribble(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Send a piece every now and then, until the server closes."""
    try:
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(PAUSE_S)
    except OSError:
        pass


async def one(target: Target, head: bytes, go_on: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> str:
    """Send the head, then go on while the answer is awaited."""
    try:
        async with connected(target) as (reader, writer):
            writer.write(head)
            going_on = asyncio.ensure_future(go_on(writer))
            try:
                return await end_of(reader)
            finally:
                going_on.cancel()
    except OSError:
        return "reset"


async def many(
    times: int, target: Target, head: bytes, go_on: Callable[[asyncio.StreamWriter], Awaitable[None]]
) -> Ends:
    return Counter(await asyncio.gather(*(one(target, head, go_on) for _ in range(times))))


async def nothing(writer: asyncio.StreamWriter) -> None:
    """Send no more."""


async def endless_header(target: Target) -> Ends:
    """130 MB in one header: 31 s of CPU once."""
    return await many(2, target, b"GET /health HTTP/1.1\r\nX: ", lambda w: flood(w, b"a" * MIB, 130 * MIB))


async def many_headers(target: Target) -> Ends:
    """40 MB of headers: 276 MB held once."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(10_000))
    return await many(4, target, b"GET /health HTTP/1.1\r\n", lambda w: flood(w, lines, 40 * MIB))


async def endless_url(target: Target) -> Ends:
    return await many(4, target, b"GET /", lambda w: flood(w, b"a" * MIB, 40 * MIB))


async def silent(target: Target) -> Ends:
    """1,500 connections that send nothing: they stayed for ever once."""
    return await many(SILENT, target, b"", nothing)


async def slow_headers(target: Target) -> Ends:
    return await many(100, target, b"GET /health HTTP/1.1\r\n", lambda w: dribble(w, b"X: a\r\n"))


def post(target: Target, *headers: str) -> bytes:
    given = ["Host: localhost", f"Authorization: Bearer {target.key}", "Content-Type: application/json", *headers]
    return ("POST /v1/completions HTTP/1.1\r\n" + "\r\n".join(given) + "\r\n\r\n").encode()


async def silent_bodies(target: Target) -> Ends:
    return await many(100, target, post(target, "Content-Length: 1000"), nothing)


async def slow_bodies(target: Target) -> Ends:
    """A byte every now and then: the total ends it, after a minute."""
    return await many(50, target, post(target, "Content-Length: 100000"), lambda w: dribble(w, b" "))


async def tiny_chunks(target: Target) -> Ends:
    head = post(target, "Transfer-Encoding: chunked")
    return await many(4, target, head, lambda w: flood(w, b"1\r\n \r\n" * 100_000, 20 * MIB))


async def chunk_extensions(target: Target) -> Ends:
    head = post(target, "Transfer-Encoding: chunked") + b"1;"
    return await many(4, target, head, lambda w: flood(w, b"a" * MIB, 100 * MIB))


async def endless_trailers(target: Target) -> Ends:
    head = post(target, "Transfer-Encoding: chunked") + b"1\r\n \r\n0\r\n"
    return await many(4, target, head, lambda w: flood(w, b"X: a\r\n" * 100_000, 40 * MIB))


async def pipelined(target: Target) -> Ends:
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20_000
    return await many(4, target, asked, nothing)


async def unread_streams(target: Target) -> Ends:
    """Streams whose client reads nothing, then goes away."""

    async def ask() -> str:
        body = {"model": target.base, "prompt": [5, 9], "max_tokens": 64, "stream": True, "logprobs": 5}
        content = json.dumps(body | {"ignore_eos": True}).encode()
        async with connected(target, limit=1) as (_, writer):
            writer.write(post(target, f"Content-Length: {len(content)}") + content)
            await asyncio.sleep(LEAVE_AFTER_S)
        return "left"

    return Counter(await asyncio.gather(*(ask() for _ in range(20))))


ATTACKS: dict[str, Attack] = {
    "connections: an endless header": endless_header,
    "connections: many headers": many_headers,
    "connections: an endless URL": endless_url,
    "connections: silent ones": silent,
    "connections: slow headers": slow_headers,
    "connections: silent bodies": silent_bodies,
    "connections: slow bodies": slow_bodies,
    "connections: tiny chunks": tiny_chunks,
    "connections: chunk extensions": chunk_extensions,
    "connections: endless trailers": endless_trailers,
    "connections: pipelined requests": pipelined,
    "connections: unread streams": unread_streams,
}
_TOO_LARGE = {"431", "reset"}
_BAD = {"400", "431", "413", "reset"}
EXPECTED: dict[str, set[str]] = {
    "connections: an endless header": _TOO_LARGE,
    "connections: many headers": _TOO_LARGE,
    "connections: an endless URL": {"414", "431", "reset"},
    "connections: silent ones": {"503", "reset"},
    "connections: slow headers": {"408", "reset"},
    "connections: silent bodies": {"408", "429", "503", "reset"},
    "connections: slow bodies": {"408", "429", "503", "reset"},
    "connections: tiny chunks": _BAD,
    "connections: chunk extensions": _BAD,
    "connections: endless trailers": _BAD,
    "connections: pipelined requests": {"200", "400", "reset"},
    "connections: unread streams": {"left"},
}
