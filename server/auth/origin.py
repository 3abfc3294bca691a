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
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


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
    """The rules for a request without a key. is_local: only this machine can connect."""

    is_local: bool

    def page_problem(self, headers: Headers) -> str | None:
        """Why a request that needs no key is rejected on a local bind: a web page made its Host point here."""
        if not self.is_local:
            return None
        found = headers.get("host", ())
        if len(found) == 1 and (host := _HOST.fullmatch(found[0])) and is_loopback(host["name"]):
            return None
        return f"found the Host {_shown(found)}, expected localhost or 127.0.0.1 while the server has no keys"

    def local_problem(self, headers: Headers) -> str | None:
        """Why a request that needs the admin key is rejected while none is set; None if it is not."""
        if not self.is_local:
            return "found no admin key on an address that others can reach; set --admin-key"
        if problem := self.page_problem(headers):
            return problem
        if foreign := [origin for origin in headers.get("origin", ()) if not _is_local_origin(origin)]:
            return f"found the Origin {_shown(foreign)}, expected none or this machine's; set --admin-key and send it"
        if "cross-site" in (site.strip().lower() for site in headers.get("sec-fetch-site", ())):
            return "found a request from a web page of another site (Sec-Fetch-Site); set --admin-key and send it"
        if forwarded := [name for name in _FORWARDED if name in headers]:
            return f"found a request through a proxy ({forwarded[0]}), expected none; set --admin-key and send it"
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
