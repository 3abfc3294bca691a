"""Owns which proxies are trusted, and the address of the client behind them.

Invariant: `X-Forwarded-For` counts only as far as addresses that the operator named have written it.
"""

import ipaddress
from collections.abc import Iterable, Sequence

UNIX_SOCKET = "unix"
"""Stands for whoever connects through the server's unix socket, who has no address."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def proxy_problem(entry: str) -> str | None:
    """Why an entry of trusted_proxies cannot be used; None if it can."""
    try:
        _network(entry)
    except ValueError:
        return f"found {entry[:60]!r}, expected an IP address, a network such as 10.0.0.0/8, or {UNIX_SOCKET}"
    return None


class TrustedProxies:
    """Addresses and networks of proxies. Raises ValueError for an entry that is neither."""

    def __init__(self, entries: Iterable[str] = ()) -> None:
        found = [_network(entry) for entry in entries]
        self._networks = [network for network in found if network is not None]
        self._trusts_socket = None in found

    def has(self, address: str | None) -> bool:
        """Whether an address (None: a unix socket) is a trusted proxy's."""
        if address is None:
            return self._trusts_socket
        parsed = _address(address)
        return parsed is not None and any(parsed in network for network in self._networks)

    def client_of(self, peer: str | None, forwarded_for: Sequence[str]) -> str | None:
        """The client's address: the last one in the values of X-Forwarded-For that no trusted proxy has.

        peer: whoever connected (None: through a unix socket). What a client wrote there itself comes before that and
        does not count; where a proxy wrote something that is no address, the proxy's own stays.
        """
        client = peer
        hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
        while hops and self.has(client):
            address = _address(_without_port(hops.pop()))
            if address is None:
                return client
            client = str(address)
        return client


def _network(entry: str) -> Network | None:
    """None: a unix socket. Raises ValueError."""
    return None if entry == UNIX_SOCKET else ipaddress.ip_network(entry)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _without_port(hop: str) -> str:
    """`10.0.0.7:1234` and `[::1]:1234` as their address: some proxies add the port."""
    if hop.startswith("["):
        return hop[1:].partition("]")[0]
    return hop.partition(":")[0] if hop.count(":") == 1 else hop
