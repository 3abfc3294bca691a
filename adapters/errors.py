"""Owns the errors of this package.

Exception
├── InvalidAdapterError         an adapter breaks docs/format.md; carries every violation found (a ValueError)
└── StoreError                  the store cannot do what was asked; nothing is left half-done
    ├── StoreLockedError        another process (or another Store of this one) has the folder open
    ├── StoreSchemaError        the folder was written by another version of the store
    ├── StoreUnusableError      the folder is read-only, not a store or damaged, or the disk fails
    └── StorageFullError        no space or no quota left
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EDQUOT, ENOSPC, EPERM, EROFS
from pathlib import Path
from typing import NamedTuple


class InvalidAdapterError(ValueError):
    """An adapter breaks docs/format.md. `violations` has all of them, each with what was found and expected."""

    code = "invalid_adapter"

    def __init__(self, source: str, violations: Sequence[str]) -> None:
        self.source, self.violations = source, tuple(violations)
        listed = "".join(f"\n  - {violation}" for violation in self.violations)
        count = "1 violation" if len(self.violations) == 1 else f"{len(self.violations)} violations"
        super().__init__(f"{source} is not a valid PERFT adapter ({count} of the format):{listed}")


class StoreError(Exception):
    """The store cannot do what was asked."""

    code = "adapter_unavailable"


class StoreLockedError(StoreError):
    """Another process has the store open."""


class StoreSchemaError(StoreError):
    """The store's schema is not the one that this version reads."""


class StoreUnusableError(StoreError):
    """The folder cannot serve as a store."""


class StorageFullError(StoreError):
    """The disk or a quota is full; the change that was asked for did not happen."""

    code = "storage_full"


class Advice(NamedTuple):
    """What to do about an error of the system: no room, no right, anything else. By default of one server's folder."""

    full: str = "free space or delete adapters, then retry"
    forbidden: str = "expected a folder that the server may change: check its owner, mode and mount"
    otherwise: str = "look at the disk, then start the server again"


OF_A_FOLDER = Advice()


@contextmanager
def store_errors(root: Path | str, doing: str, advice: Advice = OF_A_FOLDER) -> Iterator[None]:
    """Turn an OSError raised while `doing` something into an error of the store at `root`."""
    try:
        yield
    except OSError as error:
        found = f"{doing} in the store {root}: {error}"
        if error.errno in (ENOSPC, EDQUOT):
            raise StorageFullError(f"{found}; nothing changed: {advice.full}") from error
        if error.errno in (EROFS, EACCES, EPERM):
            raise StoreUnusableError(f"{found}; {advice.forbidden}") from error
        raise StoreUnusableError(f"{found}; {advice.otherwise}") from error
