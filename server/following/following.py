"""Owns what the rest of the server asks of a store, whether others change it too or not."""

from typing import Protocol


class Following(Protocol):
    """Raises StoreUnreachableError where a shared store does not answer. name: the one that matters (None: all do)."""

    async def admit(self, name: str | None = None) -> None:
        """Return once a request may be let in: every change is known that was answered before it came."""

    async def fresh(self, name: str | None = None) -> None:
        """Return once everything is known that was committed before now."""

    async def committed(self) -> None:
        """After a change: return once no server lets a request in that does not know it."""

    async def may_remove(self) -> None:
        """After a version has ended here: return once it has ended on every server."""

    def problem(self) -> str | None:
        """Why this server is not ready; None if it is."""

    def silent_s(self) -> float | None:
        """Seconds since the store last answered a look (from any thread); None of a store that is not shared."""

    def names_behind(self) -> int | None:
        """How many names others changed that are not taken over yet (from any thread); None as above."""


class Alone:
    """Of a store that only this server changes."""

    async def admit(self, name: str | None = None) -> None:
        return

    async def fresh(self, name: str | None = None) -> None:
        return

    async def committed(self) -> None:
        return

    async def may_remove(self) -> None:
        return

    def problem(self) -> None:
        return None

    def silent_s(self) -> None:
        return None

    def names_behind(self) -> None:
        return None
