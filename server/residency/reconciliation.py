"""Owns the comparison of what the scheduler expects with what the workers hold, and the repair of a difference.

Invariant: only content that did not move while the workers were asked is compared, so a move is never a difference.
"""

import logging
from collections.abc import Collection

from server.engine.protocol import Engine, LoadedTier, RankInventory
from server.residency.scheduler import ResidencyScheduler
from server.residency.state import Resident

logger = logging.getLogger(__name__)
TIERS: tuple[LoadedTier, ...] = ("host", "device")


class Reconciler:
    """See the module."""

    def __init__(self, engine: Engine, scheduler: ResidencyScheduler) -> None:
        self._engine, self._scheduler = engine, scheduler
        self._reported_rows: list[int] = []

    async def run(self) -> list[str]:
        """Ask every rank what it holds, and repair what differs. Returns one sentence per difference (also logged).

        Raises what the engine raises if it does not answer.
        """
        moved = self._scheduler.loaded.watch()
        rows_used = self._scheduler.rows_used
        try:
            ranks = await self._engine.inventory()
            found = self._differences(moved, rows_used, ranks)
        finally:
            self._scheduler.loaded.unwatch(moved)
        for difference in found:
            logger.error("residency: %s", difference)
        return found

    def _differences(self, moved: Collection[str], rows_used: int, ranks: Collection[RankInventory]) -> list[str]:
        """moved: keys of all that moved, or were removed, while the ranks were asked."""
        found: list[str] = []
        moving = {*moved, *(key for rank in ranks for key in rank.moving)}
        held = {tier: {key for rank in ranks for key in rank.held(tier)} - moving for tier in TIERS}
        loaded = {resident.key: resident for resident in self._scheduler.loaded.everywhere()}
        for key in sorted(loaded.keys() - moving | held["host"] | held["device"]):
            resident = loaded.get(key) or self._scheduler.resident(key)
            if resident is not None:
                found += self._compare(key, resident, ranks)
                continue
            for tier in TIERS:
                if key in held[tier]:
                    found.append(f"the {tier} holds {_short(key)}, which no version has; it is freed")
                    self._scheduler.transfers.discard(key, tier)
        if not found and not moving and rows_used == self._scheduler.rows_used:
            found += self._compare_rows(rows_used, [rank.rows_used for rank in ranks])
        return found

    def _compare_rows(self, expected: int, found: list[int]) -> list[str]:
        """Rows in use by rank; a difference is reported once, since only a restart mends it."""
        is_new = found != self._reported_rows
        self._reported_rows = found
        if not is_new or all(rows == expected for rows in found):
            return []
        return [f"found {found} rows in use by rank, expected {expected} on each; restart the server"]

    def _compare(self, key: str, resident: Resident, ranks: Collection[RankInventory]) -> list[str]:
        """Compare one content on all ranks; start its repair."""
        name = resident.any_owner.name
        believed = {"host": resident.on_host, "device": resident.on_device}
        lost = [tier for tier in TIERS if believed[tier] and not all(key in rank.held(tier) for rank in ranks)]
        extra = [tier for tier in TIERS if not believed[tier] and any(key in rank.held(tier) for rank in ranks)]
        if lost:
            self._scheduler.transfers.repair(resident, lost)
        elif resident.is_lost:
            resident.is_lost = False
        for tier in extra:
            self._scheduler.transfers.discard(key, tier)
        return [f"{name} should be on the {tier} of every rank and is not; it is repaired" for tier in lost] + [
            f"{name} is on the {tier} and should not be; it is freed" for tier in extra
        ]


def _short(key: str) -> str:
    return f"content {key[:12]}..."
