"""Owns who may ask: the keys of the server and whom a request comes from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Caller:
    """Whom a request comes from. label: the key's label (None: no key was needed). is_admin: may change adapters."""

    label: str | None
    is_admin: bool
