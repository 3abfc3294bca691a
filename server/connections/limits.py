"""Owns the limits of connections, and the count of those that are open.

Invariant: a connection is counted from the moment it is made until it is lost, under its client's address, unless that
is a proxy's; and as long as any is open, each is checked several times within the shortest time limit.
"""

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from server.errors import TooManyConnectionsError

CLOSE_EXTENSION = "perft.close_after_response"
"""The ASGI extension by which the app has the connection closed once its response is sent."""
CHECK_PERIOD_S = 1.0
"""The longest time between two checks of a connection."""
RETRY_AFTER_S = 5
_IPV6_CLIENT_BITS = 64
"""One client of IPv6 usually has all addresses of such a network."""


def _no_proxy(address: str | None) -> bool:
    return False


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection, one client and all together may take; the settings of the same names say more.

    is_proxy: whether an address (None: a unix socket) is a proxy's, whose connections are those of many clients.
    """

    max_header_bytes: int = 64 * 1024
    max_headers: int = 256
    header_timeout_s: float = 10.0
    body_idle_timeout_s: float = 15.0
    write_timeout_s: float = 120.0
    keep_alive_s: float = 75.0
    max_connections: int = 10_000
    max_client_connections: int = 1_000
    is_proxy: Callable[[str | None], bool] = _no_proxy

    def with_at_most(self, connections: int) -> "ConnectionLimits":
        """The same with fewer connections, half of them for one client."""
        return replace(self, max_connections=connections, max_client_connections=connections // 2)

    @property
    def check_period_s(self) -> float:
        """Seconds between two checks of every connection."""
        return min(CHECK_PERIOD_S, min(self.header_timeout_s, self.body_idle_timeout_s, self.write_timeout_s) / 4)


class Connection(Protocol):
    """An open connection, which ends itself if it is overdue. now: seconds of the loop's clock."""

    def check(self, now: float) -> None: ...


class OpenConnections:
    """The connections of one server."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self._open: dict[Connection, str | None] = {}
        """Connection -> the client that it counts for."""
        self._refused: set[Connection] = set()
        self._clients: Counter[str] = Counter()
        self._is_checking = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection, address: str | None) -> None:
        """Count a connection in. Raises TooManyConnectionsError: then it is not counted, but its times are checked."""
        limits = self.limits
        client = None if address is None or limits.is_proxy(address) else client_of(address)
        is_one_too_many = client is not None and self._clients[client] >= limits.max_client_connections
        is_full = len(self._open) >= limits.max_connections
        self._watch()
        if is_full or is_one_too_many:
            self._refused.add(connection)
            found, setting = (
                (f"{limits.max_connections} connections", "max_connections")
                if is_full
                else (f"{limits.max_client_connections} connections of your address", "max_client_connections")
            )
            message = f"found {found} open, as many as are allowed ({setting}); close some, and use one again"
            raise TooManyConnectionsError(message, retry_after_s=RETRY_AFTER_S)
        self._open[connection] = client
        if client is not None:
            self._clients[client] += 1

    def remove(self, connection: Connection) -> None:
        """Count a connection out."""
        self._refused.discard(connection)
        client = self._open.pop(connection, None)
        if client is not None:
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def _watch(self) -> None:
        if not self._is_checking:
            self._is_checking = True
            asyncio.get_running_loop().call_later(self.limits.check_period_s, self._check)

    def _check(self) -> None:
        self._is_checking = False
        now = asyncio.get_running_loop().time()
        for connection in [*self._open, *self._refused]:
            connection.check(now)
        if self._open or self._refused:
            self._watch()


def client_of(address: str) -> str:
    """The client that an address stands for: itself, or its network if it is one of IPv6."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, _IPV6_CLIENT_BITS), strict=False))
