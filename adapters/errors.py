"""Owns the errors of this package.

Exception
└── InvalidAdapterError     an adapter breaks FORMAT.md; carries every violation found
"""

from collections.abc import Sequence


class InvalidAdapterError(ValueError):
    """An adapter breaks FORMAT.md. `violations` names all of them, each with what was found and expected."""

    def __init__(self, source: str, violations: Sequence[str]) -> None:
        self.source, self.violations = source, tuple(violations)
        listed = "".join(f"\n  - {violation}" for violation in self.violations)
        super().__init__(
            f"{source} is no valid PERFT adapter ({len(self.violations)} violations of the format):{listed}"
        )
