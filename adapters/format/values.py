"""Owns the one pass over the data of a weights file: its hash, and whether every value is finite.

Invariant: every byte is read once, a block at a time; a file is never held in memory, however large.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BufferedReader

import torch

from adapters.format.header import Header, UnreadableWeightsError

BLOCK_BYTES = 4 * 1024 * 1024
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Extremes:
    """The lowest and the highest of a tensor's values and 0, and how many values are NaN or infinite."""

    lowest: float = 0.0
    highest: float = 0.0
    not_finite: int = 0

    def add(self, block: torch.Tensor) -> None:
        low, high = (float(end) for end in torch.aminmax(block))  # both NaN where there is one
        if math.isfinite(low) and math.isfinite(high):
            self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        else:
            self.not_finite += int((~torch.isfinite(block)).sum())

    def problem(self, values: int, dtype: torch.dtype | None, scale: float) -> str | None:
        """What is wrong as stored; after the cast to the model's dtype, if it is known; after the scale.

        Cast and scale keep the order of values, so the lowest and highest speak for all of them.
        """
        if self.not_finite:
            return f"{self.not_finite} of {values} values are not finite (NaN or infinity)"
        if dtype is None:
            return None
        served = torch.tensor([self.lowest, self.highest], dtype=torch.float32).to(dtype)
        if not torch.isfinite(served).all():
            largest = max(-self.lowest, self.highest)
            return f"found values up to {largest:.3g}, which overflow the model's dtype {dtype}"
        if not torch.isfinite(served * scale).all():
            return f"found values that overflow the model's dtype {dtype} once multiplied by the scale {scale:.6g}"
        return None


def read_values(
    file: BufferedReader, header: Header, scales: Mapping[str, float], dtype: torch.dtype | None
) -> tuple[list[str], bytes]:
    """Read the data behind `header` to its end: every non-finite value, and sha256 of the whole file as raw bytes.

    scales: by the name of each tensor to check. dtype: the model's, if it is known. Raises UnreadableWeightsError if
    the file ends too early.
    """
    digest = sha256(header.raw)
    found: list[str] = []
    buffer = memoryview(bytearray(BLOCK_BYTES))
    for tensor in header.tensors:
        stored = DTYPES.get(tensor.dtype) if tensor.name in scales else None
        extremes = Extremes()
        for block in _blocks(file, tensor.size, buffer):
            digest.update(block)
            if stored is not None:
                extremes.add(torch.frombuffer(block, dtype=stored))
        if stored is not None and (
            problem := extremes.problem(tensor.size // stored.itemsize, dtype, scales[tensor.name])
        ):
            found.append(f"{tensor.name}: {problem}")
    return found, digest.digest()


def _blocks(file: BufferedReader, size: int, buffer: memoryview) -> Iterator[memoryview]:
    """The next `size` bytes in blocks, each of them in `buffer`."""
    while size:
        block = buffer[:size]
        if file.readinto(block) != len(block):
            raise UnreadableWeightsError("the file became shorter while it was read")
        size -= len(block)
        yield block
