"""Owns where a request without a key may come from: only this machine, and no web page but
the server's own.

Invariant: without an admin key no route that changes adapters answers beyond loopback (or a unix socket); without a
key no page of another origin is answered, unless the operator lists it.
"""

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Headers = Mapping[str, Sequence[str]]
"""A request's headers: every value of each name, which is in lower case."""

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_ORIGIN = re.compile(r"(?P<scheme>https?)://(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:(?P<port>[0-9]{1,5}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_OWN_SITES = (["none"], ["same-origin"])
"""Sec-Fetch-Site of what a person typed or bookmarked, and of a page of this server."""
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
    """The rules for a request without a key. is_local: only this machine can connect, or a proxy on it for anybody.

    allowed_origins: whose pages may use inference (vLLM's --allowed-origins; `*`: all). Every check gets the request's
    headers, the scheme that this server speaks, and whether a proxy that the operator named sent the request.
    """

    is_local: bool
    allowed_origins: frozenset[str] = frozenset()

    def inference_problem(self, headers: Headers, scheme: str = "http", is_trusted_proxy: bool = False) -> str | None:
        """Why a request that needs no key is rejected: a web page of another origin sent it; or, on a local bind, one
        made its Host point here, or a proxy forwarded it."""
        if self.is_local:
            if problem := _host_problem(headers):
                return f"{problem} while the server has no keys"
            if not is_trusted_proxy and (forwarded := _forwarded(headers)):
                return (
                    f"found a request through a proxy ({forwarded}), expected none while the server has no keys; "
                    "set --api-key and send it, or name the proxy in --trusted-proxies"
                )
        if problem := _page_problem(headers, scheme, self.allowed_origins):
            return f"{problem}; set --api-key and send it, or list the page's origin in --allowed-origins"
        return None

    def local_problem(self, headers: Headers, scheme: str = "http", is_trusted_proxy: bool = False) -> str | None:
        """Why a request that needs the admin key is rejected while none is set; None if it is not."""
        if not self.is_local:
            return "found no admin key on an address that others can reach; set --admin-key"
        if forwarded := _forwarded(headers):
            return f"found a request through a proxy ({forwarded}), expected none; set --admin-key and send it"
        if problem := _host_problem(headers):
            return f"{problem} while the server has no admin key"
        if problem := _page_problem(headers, scheme):
            return f"{problem}; set --admin-key and send it"
        return None


def _host_problem(headers: Headers) -> str | None:
    """Why the Host is not this machine; None if it is."""
    found = headers.get("host", ())
    if len(found) != 1 or not (host := _HOST.fullmatch(found[0])) or not is_loopback(host["name"]):
        return f"found the Host {_shown(found)}, expected localhost or 127.0.0.1"
    return None


def _page_problem(headers: Headers, scheme: str, allowed: frozenset[str] = frozenset()) -> str | None:
    """Why a web page may not have sent the request: it is of another origin than this server's own pages, and not of
    an allowed one. What no browser sends has neither header."""
    origins, hosts, sites = (headers.get(name, ()) for name in ("origin", "host", "sec-fetch-site"))
    if len(origins) == 1 and ("*" in allowed or origins[0] in allowed):
        return None
    if origins and not (len(origins) == 1 and _is_same_origin(origins[0], hosts, scheme)):
        return f"found the Origin {_shown(origins)}, expected none or that of the Host {_shown(hosts)}"
    if sites and [site.strip().lower() for site in sites] not in _OWN_SITES:
        return f"found a request of another page (Sec-Fetch-Site: {_shown(sites)}), expected none or same-origin"
    return None


def _is_same_origin(origin: str, hosts: Sequence[str], scheme: str) -> bool:
    """Whether a page of `origin` asks the server that it came from. Behind a proxy that ends TLS the page has https and
    the server http; a server that ends TLS itself has no pages over http."""
    page = _ORIGIN.fullmatch(origin.lower())
    host = _ORIGIN.fullmatch(f"{page['scheme']}://{hosts[0].lower()}") if page and len(hosts) == 1 else None
    if page is None or host is None or (scheme == "https" and page["scheme"] != "https"):
        return False
    default = _DEFAULT_PORTS[page["scheme"]]
    ports = [int(found["port"] or default) for found in (page, host)]
    return page["name"] == host["name"] and ports[0] == ports[1]


def _forwarded(headers: Headers) -> str | None:
    """A header that a proxy set; None without one."""
    for name in map(str.lower, headers):
        if name in _FORWARDED or name.startswith(_FORWARDED_BY) or name.endswith(_FORWARDED_FOR):
            return name[:100]
    return None


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _shown(values: Sequence[str]) -> str:
    return repr(", ".join(values)[:100]) if values else "(none)"
