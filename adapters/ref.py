"""Owns `AdapterRef`: how server, wire and engine refer to one version of an adapter.

Invariant: an engine id means one version for ever; equal refs are the same version.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["PERFT", "LORA"]


@dataclass(frozen=True)
class AdapterRef:
    """name: NAME@version. engine_id: an integer from 1, never reused. folder: where the version's two files are."""

    name: str
    engine_id: int
    kind: Kind
    digest: str
    folder: Path

    @property
    def key(self) -> str:
        """What becomes resident: PERFT versions of equal content share their memory, PEFT LoRA versions do not."""
        return self.digest if self.kind == "PERFT" else f"{self.digest}/{self.engine_id}"

    def to_wire(self) -> dict[str, Any]:
        """Plain values, as they are sent to the workers."""
        return {
            "name": self.name,
            "engine_id": self.engine_id,
            "kind": self.kind,
            "digest": self.digest,
            "folder": str(self.folder),
        }

    @classmethod
    def from_wire(cls, values: dict[str, Any]) -> "AdapterRef":
        """The inverse of `to_wire`."""
        return cls(**{**values, "folder": Path(values["folder"])})
