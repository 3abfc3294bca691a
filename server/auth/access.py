"""Owns who may call a route: by the request's key, or without one by where it comes from.

Invariant: what the console says a caller may do and what a route then allows are decided here, by the same code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.auth.keys import ANONYMOUS, Caller, KeyRing, Need
from server.auth.origin import OriginPolicy
from server.errors import ForbiddenError, InvalidKeyError, ServerError


@dataclass(frozen=True)
class Asked:
    """What of a request counts. headers: every value of each name in lower case.

    scheme: the one that this server speaks. is_trusted_proxy: a proxy that the operator named sent it.
    """

    headers: Mapping[str, Sequence[str]]
    scheme: str = "http"
    is_trusted_proxy: bool = False

    @property
    def key_headers(self) -> tuple[str | None, str | None]:
        """The first `Authorization` and the first `x-api-key`."""
        first = (next(iter(self.headers.get(name, ())), None) for name in ("authorization", "x-api-key"))
        authorization, x_api_key = first
        return authorization, x_api_key


@dataclass(frozen=True)
class AccessRules:
    """The server's keys, and its rules for requests without one."""

    keys: KeyRing
    origin: OriginPolicy

    def caller(self, asked: Asked, need: Need, method: str, path: str) -> Caller:
        """The caller of a route. Raises InvalidKeyError or ForbiddenError if it needs more than the request has."""
        keys, given = self.keys, asked.key_headers
        known = keys.identify(*given)
        if need == "none":
            return known or ANONYMOUS
        if need == "metrics" and keys.may_read_metrics(*given):
            return known or ANONYMOUS
        if known is not None and (known.is_admin or need == "inference"):
            return known
        if self._needs_key(need, known):
            raise _wrong_key(need, path, known, any(given))
        check = self.origin.inference_problem if need == "inference" else self.origin.local_problem
        if problem := check(asked.headers, asked.scheme, asked.is_trusted_proxy):
            raise ForbiddenError(f"{method} {path}: {problem}")
        return Caller(known.label if known else None, need == "admin")

    def _needs_key(self, need: Need, known: Caller | None) -> bool:
        """Whether a key is missing: the one that the route needs, or any if the server has some."""
        if known is None and self.keys.needs_key:
            return True
        if need == "inference":
            return False
        return self.keys.has_admin or (need == "metrics" and self.keys.has_metrics_key)


def _wrong_key(need: Need, path: str, known: Caller | None, is_given: bool) -> ServerError:
    if known is not None:
        return ForbiddenError(f"found the key {known.label!r}, expected the {need} key for {path}")
    found = "an unknown key" if is_given else "no key"
    return InvalidKeyError(
        f"found {found}, expected the header `Authorization: Bearer KEY` with one of this server's keys"
    )
