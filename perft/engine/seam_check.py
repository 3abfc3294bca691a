"""Owns how a dependency on vLLM's internals is described and checked, one seam at a time.

Invariant: a check never changes vLLM, and an error names the seam, what was found and what breaks without it.
"""

import dis
import inspect
from dataclasses import dataclass
from importlib import import_module
from typing import Any

SUPPORTED_VLLM = "0.32.0"
"""The version that runs: every process checks its seams at start, and the tests run on it."""
BY_NAME = "0.33.0"
"""A version whose seams were read off its wheel (`seam_wheel.py`): the names hold, nothing of it has run."""
BOTH = (SUPPORTED_VLLM, BY_NAME)


class SeamError(RuntimeError):
    """This vLLM differs from the one PERFT was tested on; its base model could answer an adapter's request."""


@dataclass(frozen=True, kw_only=True)
class Seam:
    """One name in vLLM that we subclass, replace, call or read.

    use: what we do with it. parameters: the leading parameters we rely on, in order, without self (None: not
    checked). sets: attributes that it assigns and that we read. checked: the versions of vLLM in which it was found to
    hold. elsewhere: (version, module) where it lies in another module.
    """

    module: str
    name: str
    use: str
    parameters: tuple[str, ...] | None = None
    sets: tuple[str, ...] = ()
    checked: tuple[str, ...]
    elsewhere: tuple[tuple[str, str], ...] = ()

    def problem(self) -> str | None:
        """How this vLLM differs from what we rely on; None if it does not."""
        try:
            target: Any = import_module(self.module)
            for part in self.name.split("."):
                fields = getattr(target, "__dataclass_fields__", {})
                target = fields[part] if part in fields else getattr(target, part)
        except (ImportError, AttributeError) as error:
            return f"{self.module}.{self.name} does not exist ({error})"
        if absent := [name for name in self.sets if name not in _attributes_set(target)]:
            return f"{self.module}.{self.name} does not set the attributes {absent}"
        if self.parameters is None:
            return None
        found = tuple(name for name in inspect.signature(target).parameters if name != "self")
        if found[: len(self.parameters)] != self.parameters:
            return f"{self.module}.{self.name}: found parameters {found}, expected them to begin with {self.parameters}"
        return None


@dataclass(frozen=True, kw_only=True)
class SeamGroup:
    """Seams that serve one purpose. breaks: what fails without them. gone_when: the change in vLLM that lets us
    delete them."""

    breaks: str
    gone_when: str
    seams: tuple[Seam, ...]

    def check(self) -> None:
        """Raises SeamError for the first seam that does not hold."""
        for seam in self.seams:
            if problem := seam.problem():
                raise SeamError(f"{problem}. {self.breaks}")


def _attributes_set(function: Any) -> set[str]:
    """The attributes that a function's own code assigns."""
    return {step.argval for step in dis.get_instructions(inspect.unwrap(function)) if step.opname == "STORE_ATTR"}
