"""Owns what the console is told of its reader: what the request's key may do here, and what the page has to know.

Invariant: `may` is what server.auth.access decides for the routes themselves; what a key may not see is not said.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from server.auth.access import AccessRules, Asked
from server.auth.keys import KeyRing, Need, presented_key
from server.errors import ServerError

Kind = Literal["none", "known", "unknown", "metrics"]
"""Of key that a request presents."""


class May(BaseModel):
    """What the caller may do."""

    use: bool = Field(description="inference, and reading adapters")
    change: bool = Field(description="changing adapters")
    watch: bool = Field(description="reading metrics")


class Limits(BaseModel):
    """Limits that a page tells its reader before a request breaks them."""

    max_adapter_bytes: int
    drain_timeout_s: float
    max_model_len: int


class Rights(BaseModel):
    """What a reader of the console presented, and what it opens. why_not: the reason for each that `may` denies."""

    label: str | None
    key: Kind
    needs_key: bool = Field(description="whether inference needs a key")
    may: May
    why_not: dict[str, str]


class Session(Rights):
    """All that the page is told."""

    base: list[str] = Field(description="the names of the base; none for who may neither use nor watch")
    key_labels: list[str] = Field(description="what `allowed_keys` may have; none for who may not change adapters")
    version: str
    vllm: str
    limits: Limits
    following: str | None = Field(description="what is wrong with the store that servers share")
    engine: str | None = Field(description="what is wrong with the engine, or that the server is ending")


class _Deed(NamedTuple):
    """A route that stands for what its kind needs."""

    need: Need
    method: str
    path: str


_DEEDS = {
    "use": _Deed("inference", "GET", "/v1/adapters"),
    "change": _Deed("admin", "POST", "/v1/adapters"),
    "watch": _Deed("metrics", "GET", "/console/metrics"),
}


def rights_of(access: AccessRules, asked: Asked) -> Rights:
    """What this request's caller may do, and why not."""
    why_not: dict[str, str] = {}
    for name, deed in _DEEDS.items():
        try:
            access.caller(asked, *deed)
        except ServerError as error:
            why_not[name] = error.message
    known = access.keys.identify(*asked.key_headers)
    return Rights(
        label=None if known is None else known.label,
        key=_kind(access.keys, asked),
        needs_key=access.keys.needs_key,
        may=May(**{name: name not in why_not for name in _DEEDS}),
        why_not=why_not,
    )


@cache
def installed_version(*names: str) -> str:
    """Of the first of these distributions that is installed: vLLM's depends on the device."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _kind(keys: KeyRing, asked: Asked) -> Kind:
    if presented_key(*asked.key_headers) is None:
        return "none"
    if keys.identify(*asked.key_headers) is not None:
        return "known"
    return "metrics" if keys.is_metrics_key(*asked.key_headers) else "unknown"
