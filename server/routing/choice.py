"""Owns which of the live replicas a request goes to, from what they last reported and from what was sent to them since.

Nobody tells a router when a request ends: a replica's load is what it last reported under way, and every request sent
to it after that.
"""

import random
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapters.names import is_name
from server.routing.rendezvous import Popularity, choose, home_count, name_of, two_choices

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica tells of itself. number: of this report. rank: among the replicas; one that takes its place
    inherits it. ready: as GET /ready says. running: responses under way. metrics: HOST:PORT of the listener for
    /metrics alone, if there is one."""

    number: int
    rank: int
    ready: bool
    running: int
    metrics: str | None = None


@dataclass
class _Sent:
    """Requests sent to a replica since its report of this number."""

    report: int = -1
    requests: int = 0


class ReplicaChoice(Generic[Key]):
    """Requests of an adapter go by its name (see `rendezvous`), those of the base and those whose model says nothing to
    the less busy of two replicas. A replica that is not ready, or has not reported yet, gets none while another can.

    base_names: the names of the base model, which every replica serves. clock: monotonic, seconds.
    """

    def __init__(
        self,
        base_names: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        self._base_names = frozenset(base_names)
        self._clock = clock
        self._random = random.Random(seed)
        self._popularity = Popularity()
        self._sent: dict[Key, _Sent] = {}

    def choose(self, model: object, replicas: Mapping[Key, ReplicaReport | None]) -> Key:
        """The replica for a request, which then counts as sent to it.

        model: what the request's body says. replicas: every live one with its last report, None before the first.
        Raises ValueError if there are none.
        """
        if not replicas:
            raise ValueError("found no live replica, expected at least one")
        name = self._adapter_of(model)
        self._popularity.add(name, self._clock())
        self._forget_the_gone(replicas)
        ready = [key for key, report in replicas.items() if report is not None and report.ready]
        by_rank: dict[int, tuple[int, Key]] = {}
        for key in ready or replicas:
            report = replicas[key]
            load = self._load(key, report)
            rank = len(by_rank) if report is None else report.rank
            if rank not in by_rank or load < by_rank[rank][0]:  # two have one rank while one takes over
                by_rank[rank] = load, key
        loads = {rank: load for rank, (load, _) in by_rank.items()}
        if name is None:
            rank = two_choices(loads, self._random)
        else:
            rank = choose(name, loads, home_count(self._popularity.share(name), loads))
        chosen = by_rank[rank][1]
        self._sent[chosen].requests += 1
        return chosen

    def _load(self, key: Key, report: ReplicaReport | None) -> int:
        sent = self._sent.setdefault(key, _Sent())
        if report is None:
            return sent.requests
        if report.number != sent.report:
            sent.report, sent.requests = report.number, 0
        return report.running + sent.requests

    def _forget_the_gone(self, replicas: Mapping[Key, ReplicaReport | None]) -> None:
        if len(self._sent) > len(replicas):
            self._sent = {key: sent for key, sent in self._sent.items() if key in replicas}

    def _adapter_of(self, model: object) -> str | None:
        """The adapter's name; None for the base, and for what names no adapter: the replica answers that."""
        if not isinstance(model, str) or model in self._base_names:
            return None
        name = name_of(model)
        return name if is_name(name) else None
