"""What an attack is given, how it sends, and how it notes the ends it saw."""

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import psutil

from tests.server.processes import ServerProcess

ROUND_LIMIT_S = 120.0
"""Seconds after which one request of an attack is given up as `timeout`; far more than the server may take."""


@dataclass(frozen=True)
class Target:
    """A server under attack. key: the attacker's, for inference. base, adapters: names that it may select."""

    host: str
    port: int
    key: str
    base: str
    adapters: tuple[str, ...]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self) -> httpx.AsyncClient:
        """A client of its own: no connection is shared with others."""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=5)
        return httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=ROUND_LIMIT_S, limits=limits)


Ends = Counter[str]
"""How often each end came: a status ("400"), `reset` (the server closed), `timeout`, `left` (the client went away)."""

Attack = Callable[[Target], Awaitable[Ends]]
"""One round of an attack; it ends by itself, soon after the server has answered or closed."""


async def post(
    client: httpx.AsyncClient, path: str, body: bytes | dict[str, Any], leave_after_s: float | None = None
) -> str:
    """Send a JSON body and return how it ended; with `leave_after_s` the client goes away then, if not answered."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    try:
        async with asyncio.timeout(leave_after_s):
            response = await client.post(path, content=content, headers=headers)
    except TimeoutError:
        return "left"
    except httpx.TimeoutException:
        return "timeout"
    except httpx.HTTPError:
        return "reset"
    return str(response.status_code)


async def post_all(
    target: Target, path: str, bodies: list[bytes | dict[str, Any]], leave_after_s: float | None = None
) -> Ends:
    """Send all bodies at once, each on a connection of its own."""
    async with target.client() as client:
        return Counter(await asyncio.gather(*(post(client, path, body, leave_after_s) for body in bodies)))


def all_memory(server: ServerProcess) -> int:
    """Bytes of the server's processes together, those it started included."""
    api = psutil.Process(server.process.pid)
    return sum(process.memory_info().rss for process in (api, *api.children(recursive=True)))
