"""Owns what one request asks its output to be like: the kind and value of its constraint, as vLLM will read them.

Invariant: two specs with equal digests are compiled alike.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""The fields of vLLM's StructuredOutputsParams of which exactly one is set."""


@dataclass(frozen=True)
class Spec:
    """kind: one of KINDS. stop_tokens: ids at which the request stops, which end the grammar too."""

    kind: str
    value: Any
    stop_tokens: tuple[int, ...] = ()

    @cached_property
    def text(self) -> str:
        """The spec as JSON. Only for one that is not nested too deeply."""
        return json.dumps({self.kind: self.value})

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(f"{self.stop_tokens}{self.text}".encode()).digest()


def spec_of(params: Any, stop_tokens: Iterable[int] = ()) -> Spec | None:
    """The spec in vLLM's StructuredOutputsParams; None if it constrains nothing."""
    for kind in KINDS:
        if (value := getattr(params, kind, None)) is not None:
            return Spec(kind, value, tuple(sorted(stop_tokens)))
    return None
