"""Owns the settings of connections, a part of `Settings`: how large, how slow, how many, and which are proxies."""

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode

from server.auth.proxies import TrustedProxies, proxy_problem


class ConnectionSettings(BaseSettings):
    """The limits of connections; read as a part of `server.settings.model.Settings`."""

    max_header_bytes: int = Field(
        64 * 1024, ge=1024, description="bytes of a request's headers and URL; more are refused with 431"
    )
    max_headers: int = Field(256, ge=16, description="headers of a request; more are refused with 431")
    header_timeout_s: float = Field(
        10.0, gt=0, description="seconds for the headers of a request, from the connection or the first byte on"
    )
    body_timeout_s: float = Field(60.0, gt=0, description="seconds for the whole body of a request, uploads apart")
    body_idle_timeout_s: float = Field(
        15.0, gt=0, description="seconds without a byte after which a request's body fails, uploads apart"
    )
    write_timeout_s: float = Field(
        120.0, gt=0, description="seconds that a client may leave its response unread before the connection is closed"
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        description="seconds that an idle connection stays open: longer than a load balancer keeps it, so that none "
        "is closed just as it is used again; unless set, VLLM_HTTP_TIMEOUT_KEEP_ALIVE counts",
    )
    max_connections: int = Field(10_000, ge=1, description="connections open at once; further ones get 503")
    max_client_connections: int = Field(
        1_000, ge=1, description="connections of one address (one /64 network of IPv6), trusted proxies apart"
    )
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="addresses and networks of proxies in front, separated by commas, or `unix` for whoever connects "
        "through --uds: from these alone X-Forwarded-For says who the client is",
    )

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split_proxies(cls, value: Any) -> Any:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("trusted_proxies")
    @classmethod
    def _check_proxies(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        if problems := [problem for problem in map(proxy_problem, entries) if problem]:
            raise ValueError("\n".join(problems))
        return entries

    @cached_property
    def proxies(self) -> TrustedProxies:
        """The proxies that are trusted."""
        return TrustedProxies(self.trusted_proxies)
