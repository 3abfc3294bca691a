"""Owns one version while the server runs: its record, its engine id, and the requests that use it.

Invariant: a version with leases is not removed.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

from adapters.ref import AdapterRef, Kind
from adapters.store import VersionRecord
from server.errors import AdapterDeletedError, AdapterUnavailableError
from server.residency.state import Tier
from server.uploads.validate import ValidatedAdapter

VersionState = Literal["ready", "draining", "failed"]
SEARCHED_CHARACTERS = 1000
"""Of a description, from its beginning."""
BETWEEN = "\0"
"""What stands between name and description where both are searched; no search has it."""


@dataclass(eq=False)
class Version:
    """One version of `name`. accepted is None where this server cannot serve what the store holds: `failure` says why.

    leases: requests from their admission to the last byte of their response. running: engine request ids, of which a
    request for several choices has several; requests_running counts it once. last_used: unix seconds.
    """

    name: str
    record: VersionRecord
    ref: AdapterRef
    accepted: ValidatedAdapter | None
    failure: str | None = None
    leases: int = 0
    running: set[str] = field(default_factory=set)
    requests_running: int = 0
    last_used: int | None = None
    is_deleted: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def id(self) -> str:
        """NAME@version."""
        return self.ref.name

    @property
    def number(self) -> int:
        return self.record.version

    @property
    def rows(self) -> int:
        """Rows of the device pool that it takes."""
        return 0 if self.accepted is None else self.accepted.need.rows

    @cached_property
    def searched(self) -> str:
        """The text that a search of the list compares: the name, and its description from the beginning."""
        config = None if self.accepted is None else self.accepted.config
        description = "" if config is None else config.description or ""
        return f"{self.name}{BETWEEN}{description[:SEARCHED_CHARACTERS].casefold()}"

    @property
    def is_draining(self) -> bool:
        return self.record.state == "draining"

    @property
    def rank(self) -> int | None:
        """Of its experts, or of a PEFT LoRA adapter."""
        if self.accepted is None:
            return None
        return _lora_rank(self.record.config) if self.accepted.config is None else self.accepted.config.bottleneck

    def lease(self) -> None:
        """One more request uses it."""
        self.leases += 1
        self.last_used = int(time.time())
        self.idle.clear()

    def release(self) -> None:
        """A request has ended."""
        assert self.leases > 0, self.id
        self.leases -= 1
        self.last_used = int(time.time())
        if not self.leases:
            self.idle.set()

    def view(self, tier: Tier, load_failure: str | None) -> "VersionView":
        """The version as it is now. load_failure: why its last load failed."""
        config = None if self.accepted is None else self.accepted.config
        reason = self.failure or load_failure
        state: VersionState = "draining" if self.is_draining else "failed" if reason else "ready"
        return VersionView(
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
            rows=self.rows,
            created=self.record.created,
            resident=tier,
            requests_running=self.requests_running,
            last_used=self.last_used,
            description=None if config is None else config.description,
        )


@lru_cache(1024)
def _lora_rank(config: str) -> int | None:
    """`r` of a PEFT LoRA adapter's configuration, which was checked."""
    rank = json.loads(config).get("r")
    return rank if isinstance(rank, int) else None


@dataclass(frozen=True)
class VersionView:
    """One version as a caller sees it (docs/api.md, "The adapter object"). created and last_used: unix seconds.

    requests_running and last_used: None for a caller that shares it with other keys.
    """

    version: int
    id: str
    digest: str
    state: VersionState
    reason: str | None
    peft_type: Kind
    variant: str | None
    expert_type: str | None
    num_experts: int | None
    top_k: int | None
    bottleneck: int | None
    size_bytes: int
    rows: int
    created: int
    resident: Tier
    requests_running: int | None
    last_used: int | None
    description: str | None


@dataclass(frozen=True)
class AdapterView:
    """An adapter as a caller sees it: its name, its versions, and which of them is active.

    uploaded: after an upload the version that it became, or that had its content already.
    """

    name: str
    active: int | None
    allowed_keys: list[str] | None
    pinned: bool
    versions: list[VersionView]
    uploaded: int | None = None


def adapter_deleted(version: Version) -> AdapterDeletedError:
    """The error of a request that outlived its version's drain timeout."""
    return AdapterDeletedError(f"{version.id} was deleted while the request ran")


def unservable(version: Version, param: str | None = None) -> AdapterUnavailableError:
    """The error of a request for a version that this server cannot serve."""
    return AdapterUnavailableError(f"{version.id} cannot be served: {version.failure}", param=param, retry_after_s=60)
