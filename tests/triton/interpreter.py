"""Makes Triton's interpreter compute bfloat16 as a device does.

NumPy has no bfloat16, so the interpreter keeps the bits as uint16. Two of its operations (Triton 3.7) are wrong on
them: `dot` multiplies the bits as integers, and a conversion cuts off, or carries into nothing. Here both go by way of
float32, rounded to nearest even by torch.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits (uint16), rounded to nearest even."""
    rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(values.shape)


def mend() -> None:
    """Replace the two operations for this process."""
    builder, convert = interpreter.InterpreterBuilder, interpreter._convert_float
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (interpreter.TensorHandle(widened(side.data), tl.float32) for side in (a, b))
        return dot(self, a, b, d, *options)

    def convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data).view(np.uint32)
        if (source, target) == (tl.float32, tl.bfloat16):
            return narrowed(data)
        return convert(data, source, target, rounding)

    builder.create_dot, interpreter._convert_float = create_dot, convert_float
