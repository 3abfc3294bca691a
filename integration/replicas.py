"""Small real HTTP servers that say who they are, and answer only when the test lets them."""

import asyncio
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from tests.server.processes import free_port, wait_until

POLL_S = 0.01
FORWARDED_FOR = b"x-forwarded-for"


@dataclass
class Request:
    """One that has arrived, its body so far. is_gone: its client has left."""

    path: str
    forwarded_for: list[str]
    body: bytes = b""
    is_whole: bool = False
    is_gone: bool = False
    events: int = 0


def digest_of(body: bytes) -> str:
    """What a replica says of a body that it got."""
    return hashlib.sha256(body).hexdigest()


@dataclass
class Replica:
    """A server in a thread of its own.

    is_ready: what /ready says. holds: while set, no request is answered, and of a stream only as many events as
    `events_allowed`. running: whole requests that have no answer yet.
    """

    name: str
    port: int = field(default_factory=free_port)
    is_ready: bool = True
    holds: bool = False
    events_allowed: int = 0
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    _server: uvicorn.Server | None = None
    _thread: threading.Thread | None = None

    def reset(self) -> None:
        """As it was at first; what ran ends."""
        self.holds, self.is_ready, self.events_allowed = False, True, 0
        wait_until(lambda: self.running == 0)
        self.requests.clear()

    def start(self) -> None:
        """Listen, and answer from now on."""
        config = uvicorn.Config(
            self._answer, port=self.port, interface="asgi3", lifespan="off", proxy_headers=False, log_level="warning",
            timeout_graceful_shutdown=0,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        wait_until(self.is_listening)

    def stop(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None and self._thread is not None
        self.holds = False
        self._server.should_exit = True
        self._thread.join()

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/ready":
            return await _send(send, 200 if self.is_ready else 503, {})
        request = Request(scope["path"], [value.decode() for name, value in scope["headers"] if name == FORWARDED_FOR])
        self.requests.append(request)
        while not request.is_whole:
            message = await receive()
            if message["type"] == "http.disconnect":
                request.is_gone = True
                return
            request.body += message["body"]
            request.is_whole = not message.get("more_body", False)
        self.running += 1
        leaving = asyncio.create_task(_left(receive, request))
        try:
            if re.search(rb'"stream": ?true', request.body):
                await self._stream(request, send)
            else:
                await self._whole(request, send)
        finally:
            self.running -= 1
            leaving.cancel()

    async def _whole(self, request: Request, send: Any) -> None:
        while self.holds and not request.is_gone:
            await asyncio.sleep(POLL_S)
        if not request.is_gone:
            await _send(send, 200, {"server": self.name, "digest": digest_of(request.body), "path": request.path})

    async def _stream(self, request: Request, send: Any) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
        await send(start)
        while self.holds and not request.is_gone:
            while request.events < self.events_allowed:
                event = f"data: {self.name} {request.events}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": True})
                request.events += 1
            await asyncio.sleep(POLL_S)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _left(receive: Any, request: Request) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    request.is_gone = True


async def _send(send: Any, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@contextmanager
def replicas(count: int) -> Iterator[list[Replica]]:
    """That many, named r1, r2, ..."""
    started = [Replica(f"r{number}") for number in range(1, count + 1)]
    for replica in started:
        replica.start()
    try:
        yield started
    finally:
        for replica in started:
            if replica.is_listening():
                replica.stop()
