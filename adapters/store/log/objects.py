"""Owns what the log store needs of a place that many machines reach: objects under keys, and one atomic step.

The atomic step is `create`: an object appears whole, and only if there was none. Everything else is made of it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol


class Found(NamedTuple):
    """An object in a listing. modified: unix seconds, by the clock of the place."""

    key: str
    size: int
    modified: float


class Objects(Protocol):
    """Objects by key (parts of [0-9a-z_.-], separated by "/"). Every method blocks, and raises OSError if the place
    cannot be reached or refuses; then it is not known whether a change was made."""

    def __str__(self) -> str:
        """The address, for messages; without secrets."""

    def create(self, key: str, data: bytes) -> bool:
        """Write an object durably; False if there is one, which stays as it is."""

    def get(self, key: str) -> bytes | None:
        """The bytes of an object; None if there is none."""

    def list(self, prefix: str, after: str = "") -> Iterator[Found]:
        """The objects whose keys begin with `prefix` and come after the key `after`, by key."""

    def put_file(self, key: str, file: Path) -> None:
        """Copy a file there durably. The key is one that was never used."""

    def get_file(self, key: str, file: Path) -> None:
        """Copy an object into a new file. Raises FileNotFoundError if there is none."""

    def remove(self, key: str) -> None:
        """Remove an object, if it still exists."""
