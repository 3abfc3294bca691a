"""Owns the names: which adapter versions are served, and which of them a request's `model` means.

Invariant: `resolve` answers from memory and keeps nothing, so made-up names cost nothing lasting.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from adapters import CheckedAdapter
from server.errors import ModelNotFound

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class ServedVersion:
    """One version of one adapter. `engine_id` is its LoRA id in the engine, never reused."""

    name: str
    version: int
    engine_id: int
    adapter: CheckedAdapter

    @property
    def id(self) -> str:
        """NAME@version: the resolved name that answers carry."""
        return f"{self.name}@{self.version}"


class Registry:
    """The base's names and every served version."""

    def __init__(self, base_names: list[str]) -> None:
        self.base_names = base_names
        self._active: dict[str, ServedVersion] = {}
        self._by_id: dict[str, ServedVersion] = {}

    def add(self, version: ServedVersion) -> None:
        """Serve a version and make it its name's active one."""
        self._active[version.name] = version
        self._by_id[version.id] = version

    def resolve(self, model: str) -> ServedVersion | None:
        """The version that NAME or NAME@version means, None for the base. Raises ModelNotFound otherwise."""
        if model in self.base_names:
            return None
        found = self._active.get(model) or self._by_id.get(model)
        if found is None:
            raise ModelNotFound(model)
        return found

    def active(self) -> Iterator[ServedVersion]:
        """Every name's active version, by name."""
        return iter([self._active[name] for name in sorted(self._active)])

    def selectable(self) -> dict[str, ServedVersion]:
        """Every string that selects an adapter, NAME and NAME@version alike."""
        return self._active | self._by_id


def name_problem(name: str, base_names: list[str]) -> str | None:
    """Why `name` cannot be an adapter's name, or None."""
    if not NAME_PATTERN.fullmatch(name):
        return f"found the name {name!r}, expected {NAME_PATTERN.pattern} (lower-case letters, digits, '.', '_', '-')"
    if name in base_names:
        return f"found the name {name!r}, which is the base model's served name: choose another"
    return None
