"""Owns how Ray Serve asks which replica a request goes to: its `request_router_class`. Imports neither torch nor vLLM.

Ray's ingress router asks it and HAProxy then talks to the replica itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from server.routing.choice import ReplicaChoice, ReplicaReport

REPORT_KEY = "perft"
"""In what Ray calls the routing stats of a replica."""


def routing_stats(report: ReplicaReport) -> dict[str, Any]:
    """What a replica's `record_routing_stats` returns; Ray's controller passes it on to the routers."""
    return {REPORT_KEY: asdict(report)}


def report_of(stats: Mapping[str, Any]) -> ReplicaReport | None:
    """What a replica reported; None before its first report."""
    found = stats.get(REPORT_KEY)
    return None if found is None else ReplicaReport(**found)


class AdapterRouter(RequestRouter):
    """See `server.routing.choice.ReplicaChoice`. Needs `server.ray_serve.replica.PerftServer` as the deployment."""

    def initialize_state(self, base_names: Iterable[str] = ()) -> None:
        """base_names: the names of the base model."""
        self._choice: ReplicaChoice[ReplicaID] = ReplicaChoice(base_names)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica, as a list of one rank; none of no candidates."""
        if not candidate_replicas:
            return []
        body = pending_request.args[0] if pending_request is not None and pending_request.args else None
        reports = {replica.replica_id: report_of(replica.routing_stats) for replica in candidate_replicas}
        chosen = self._choice.choose(getattr(body, "model", None), reports)
        return [[replica for replica in candidate_replicas if replica.replica_id == chosen]]
