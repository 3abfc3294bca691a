"""Owns loading by order: our server has a worker load adapters beside the steps, before it admits their requests.

An adapter makes two moves, `prepare` (disk to host) and `place` (host to device). Every method runs on the engine's
thread between two steps and returns at once; long work runs on background threads, and `outcome` reports how it
went. Invariant: the inventory lists a key as held only once all of its adapter is there.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from adapters.ref import AdapterRef, Kind
from perft.engine.host_cache import COPY_WAIT_S, READ_WAIT_S, Mover, Outcome
from perft.engine.moe_layer import StepState

Move = Literal["prepare", "place"]


class Loader(Protocol):
    """Loads adapters of one kind, known by `AdapterRef.key`. It ignores keys that it does not hold."""

    def prepare(self, adapter: AdapterRef) -> Outcome:
        """Start reading an adapter from disk to the host."""

    def place(self, adapter: AdapterRef) -> Outcome:
        """Start copying an adapter from the host to the device, where there must be room for it."""

    def evict(self, key: str) -> None:
        """Free an adapter's memory on the device. No running request may use it."""

    def drop(self, key: str) -> None:
        """Free the host's copy of an adapter."""

    def host_keys(self) -> list[str]:
        """Every adapter that is whole on the host."""

    def device_keys(self) -> list[str]:
        """Every adapter that is whole on the device, also one that a step loaded."""


class Movers:
    """The two background threads of a worker: one reads, the other copies, so that a long read delays no copy."""

    def __init__(self) -> None:
        self._movers: dict[Move, Mover] = {"prepare": Mover(READ_WAIT_S), "place": Mover(COPY_WAIT_S)}

    def __getitem__(self, move: Move) -> Mover:
        return self._movers[move]

    def running(self) -> list[str]:
        """The keys of all moves under way."""
        return [key for mover in self._movers.values() for key in mover.running()]


@dataclass(frozen=True)
class Inventory:
    """The keys that a worker holds on the host and on the device, and those it is moving, sorted."""

    host: list[str]
    device: list[str]
    moving: list[str]


class OrderedLoading:
    """Hands each order to the loader of the adapter's kind."""

    def __init__(self, step: StepState, movers: Movers, perft: Loader) -> None:
        self._step, self._movers = step, movers
        self._loaders: dict[Kind, Loader] = {"PERFT": perft}

    def add_loader(self, kind: Kind, loader: Loader) -> None:
        """Load adapters of a further kind. Those of a kind without a loader fail as invalid PERFT adapters."""
        self._loaders[kind] = loader

    def prepare(self, adapter: AdapterRef) -> Outcome:
        return self._loader(adapter).prepare(adapter)

    def place(self, adapter: AdapterRef) -> Outcome:
        return self._loader(adapter).place(adapter)

    def outcome(self, move: Move, adapter: AdapterRef) -> Outcome:
        """The state of a move that was started; its end is reported once."""
        return self._movers[move].outcome(adapter.key)

    def evict(self, key: str) -> None:
        self._step.step = None
        for loader in self._loaders.values():
            loader.evict(key)

    def drop(self, key: str) -> None:
        for loader in self._loaders.values():
            loader.drop(key)

    def inventory(self) -> Inventory:
        """What is held and what is moving. A move that ends meanwhile is listed as both, never as neither."""
        moving = sorted(set(self._movers.running()))
        host = sorted(key for loader in self._loaders.values() for key in loader.host_keys())
        device = sorted(key for loader in self._loaders.values() for key in loader.device_keys())
        return Inventory(host, device, moving)

    def _loader(self, adapter: AdapterRef) -> Loader:
        return self._loaders.get(adapter.kind, self._loaders["PERFT"])
