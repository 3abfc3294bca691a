"""Owns where a request without a key may come from: only this machine, and never a web page in a browser.

Invariant: without an admin key no route that changes adapters answers beyond loopback (or a unix socket).
"""

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

Headers = Mapping[str, Sequence[str]]
"""A request's headers: every value of each name, which is in lower case."""

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_FORWARDED_BY = (
    "forwarded",
    "x-forwarded",
    "x-original-",
    "x-envoy-",
    "x-cluster-",
    "x-proxy",
    "x-azure-",
    "x-appengine-",
)
_FORWARDED_FOR = ("client-ip", "real-ip", "connecting-ip", "remote-ip", "remote-addr", "user-ip")
_FORWARDED = ("via", "cdn-loop", "cf-ray", "cf-visitor", "x-amzn-trace-id")
"""How headers begin, how they end, and whole ones, by which proxies and CDNs say that they ask for somebody else."""


def is_loopback(name: str) -> bool:
    """Whether a name in Host or Origin is this machine: localhost, 127.0.0.0/8 or ::1."""
    bare = name.strip("[]")
    if bare.lower() == "localhost":
        return True
    try:
        return _is_loopback_address(bare)
    except ValueError:
        return False


def is_local_bind(host: str | None, uds: str | None = None) -> bool:
    """Whether only this machine can connect: a unix socket, or a host all of whose addresses are loopback."""
    if uds:
        return True
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_loopback_address(str(address[4][0])) for address in found)


def bind_problem(host: str | None, has_admin: bool, uds: str | None = None) -> str | None:
    """Why the server must not listen there, None if it may."""
    if has_admin or is_local_bind(host, uds):
        return None
    return (
        f"--host {host or '(every interface)'}: found no admin key on an address that others can reach, where "
        "anyone could change adapters; set --admin-key (PERFT_ADMIN_KEY), or bind to 127.0.0.1"
    )


@dataclass(frozen=True)
class OriginPolicy:
    """The rules for a request without a key. is_local: only this machine can connect, or a proxy on it for anybody."""

    is_local: bool

    def page_problem(self, headers: Headers, is_trusted_proxy: bool = False) -> str | None:
        """Why a request that needs no key is rejected on a local bind: a web page made its Host point here, or a proxy
        forwarded it. is_trusted_proxy: the operator named the proxy."""
        if not self.is_local:
            return None
        found = headers.get("host", ())
        if len(found) != 1 or not (host := _HOST.fullmatch(found[0])) or not is_loopback(host["name"]):
            return f"found the Host {_shown(found)}, expected localhost or 127.0.0.1 while the server has no keys"
        if not is_trusted_proxy and (forwarded := _forwarded(headers)):
            return (
                f"found a request through a proxy ({forwarded}), expected none while the server has no keys; "
                "set --api-key and send it, or name the proxy in --trusted-proxies"
            )
        return None

    def local_problem(self, headers: Headers) -> str | None:
        """Why a request that needs the admin key is rejected while none is set; None if it is not."""
        if not self.is_local:
            return "found no admin key on an address that others can reach; set --admin-key"
        if forwarded := _forwarded(headers):
            return f"found a request through a proxy ({forwarded}), expected none; set --admin-key and send it"
        if problem := self.page_problem(headers):
            return problem
        if foreign := [origin for origin in headers.get("origin", ()) if not _is_local_origin(origin)]:
            return f"found the Origin {_shown(foreign)}, expected none or this machine's; set --admin-key and send it"
        if "cross-site" in (site.strip().lower() for site in headers.get("sec-fetch-site", ())):
            return "found a request from a web page of another site (Sec-Fetch-Site); set --admin-key and send it"
        return None


def _forwarded(headers: Headers) -> str | None:
    """A header that a proxy set; None without one."""
    for name in map(str.lower, headers):
        if name in _FORWARDED or name.startswith(_FORWARDED_BY) or name.endswith(_FORWARDED_FOR):
            return name[:100]
    return None


def _is_local_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        host = _HOST.fullmatch(parts.netloc)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and host is not None and is_loopback(host["name"])


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _shown(values: Sequence[str]) -> str:
    return repr(", ".join(values)[:100]) if values else "(none)"
