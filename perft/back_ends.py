"""Owns the names of the operator's back ends, apart from what computes them, so that a command line loads quickly."""

from typing import Literal

BackEnd = Literal["auto", "torch", "numba", "triton"]
