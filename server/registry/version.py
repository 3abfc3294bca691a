"""Owns one version while the server runs: its record, what the engine knows of it, and who uses it now.

Invariant: a version with leases is not removed.
"""

import asyncio
import time
from dataclasses import dataclass, field

from adapters import VersionRecord
from adapters.ref import AdapterRef
from server.api.schemas import Residency, VersionObject, VersionState
from server.errors import ApiError
from server.uploads.validate import ValidatedAdapter


@dataclass(eq=False)
class Version:
    """One version of `name`. accepted is None where this server cannot serve what the store holds: `failure` says why.

    leases: requests from their admission to the last byte of their answer. running: engine request ids.
    """

    name: str
    record: VersionRecord
    engine: AdapterRef
    accepted: ValidatedAdapter | None
    failure: str | None = None
    leases: int = 0
    running: set[str] = field(default_factory=set)
    last_used: int | None = None
    is_deleted: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def id(self) -> str:
        return self.engine.name

    @property
    def number(self) -> int:
        return self.record.version

    def lease(self) -> None:
        """One more request uses it."""
        self.leases += 1
        self.last_used = int(time.time())
        self.idle.clear()

    def release(self) -> None:
        """A request ended."""
        assert self.leases > 0, self.id
        self.leases -= 1
        self.last_used = int(time.time())
        if not self.leases:
            self.idle.set()

    def as_object(self, resident: Residency, failure: str | None) -> VersionObject:
        """The version on the wire. failure: why its last load failed."""
        config = None if self.accepted is None else self.accepted.config
        reason = self.failure or failure
        state: VersionState = "draining" if self.record.state == "draining" else "failed" if reason else "ready"
        return VersionObject(
            version=self.number,
            id=self.id,
            digest=self.record.digest,
            state=state,
            reason=reason if state == "failed" else None,
            peft_type=self.record.kind,
            variant=None if config is None else config.variant,
            expert_type=None if config is None else config.expert_type,
            num_experts=None if config is None else config.num_experts,
            top_k=None if config is None else config.top_k,
            bottleneck=None if config is None else config.bottleneck,
            size_bytes=self.record.size_bytes,
            rows=0 if self.accepted is None else self.accepted.need.rows,
            created=self.record.created,
            resident=resident,
            requests_running=len(self.running),
            last_used=self.last_used,
            description=None if config is None else config.description,
        )


def adapter_deleted(version: Version) -> ApiError:
    """What ends a request that outlived its version's deadline."""
    return ApiError(410, "adapter_deleted", f"{version.id} was deleted while the request ran", "model")
