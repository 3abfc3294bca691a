"""Owns what one inference request may hold, as numbers; they follow the length of the served model.

Invariant: what vLLM parses and validates within these numbers keeps its event loop busy for about 0.1 s at most
(measured: docs/log.md).
"""

from dataclasses import dataclass

KEPT_BYTES = 64 * 1024
"""A body up to here is read at once and takes no turn; nearly every request of a chat is smaller."""
MAX_DEPTH = 64
"""Levels of arrays and objects in a body."""
MAX_SCHEMA_VALUES = 8192
"""JSON values in a tool or in a field that holds a schema: vLLM takes those as they are."""
MAX_FIELD_VALUES = 2048
"""JSON values in one element of a list, or in any other field: what pydantic may look at with every branch of a union,
at up to 0.05 ms for each."""


@dataclass(frozen=True)
class BodyLimits:
    """Limits of one request. max_bytes: None follows the model's length.

    max_sequences: prompts times `n`. max_model_len: tokens.
    """

    max_model_len: int = 8192
    max_bytes: int | None = None
    max_sequences: int = 128

    @property
    def body_bytes(self) -> int:
        """Bytes of a body."""
        return self.max_bytes or 1024**2 + 64 * self.max_model_len

    @property
    def items(self) -> int:
        """Messages, tools, input items: elements of a list of objects."""
        return 2048 + self.max_model_len // 64

    @property
    def values(self) -> int:
        """JSON values of a body, token ids not counted."""
        return 16384 + self.max_model_len // 8

    @property
    def token_ids(self) -> int:
        """Token ids of all prompts."""
        return 2**18 + self.max_model_len

    @property
    def budget(self) -> int:
        """Bytes of all bodies over KEPT_BYTES that are being received or parsed."""
        return max(8 * self.body_bytes, 64 * 1024**2)
