"""Owns a listener beside vLLM's: one more uvicorn server on the same loop, with the same bounds.

Invariant: it takes no signal, and a client of it holds no thread.
"""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from server.connections.limits import ConnectionLimits
from server.connections.protocol import bounded_protocol

LAST_RESPONSES_S = 1
"""Seconds that running responses have once the listener ends."""


class _SilentServer(uvicorn.Server):
    """Leaves the signals of the process to vLLM's own server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Listener:
    """A listener at work. address: HOST:PORT, with the port that 0 chose."""

    def __init__(self, server: uvicorn.Server, bound: socket.socket) -> None:
        self._server = server
        self._task = asyncio.create_task(server.serve([bound]))
        host, port = bound.getsockname()[:2]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def started(self) -> None:
        """Wait until it listens."""
        while not (self._server.started or self._task.done()):
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        """Take no new connection, and wait for the responses under way."""
        self._server.should_exit = True
        await self._task


async def listen(app: Any, address: tuple[str, int], limits: ConnectionLimits) -> Listener:
    """Serve an ASGI app at (host, port). Raises OSError."""
    host, port = address
    family, _, _, _, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found)
    except OSError:
        bound.close()
        raise
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_graceful_shutdown=LAST_RESPONSES_S,
    )
    listener = Listener(_SilentServer(config), bound)
    await listener.started()
    return listener
