"""Owns which back end of the operator serves: by what was asked for, else by the device."""

from typing import get_args

import torch

from perft.back_ends import BackEnd
from perft.operator.base import Operator, Sizes
from perft.operator.tables import SlotTables
from perft.operator.torch_backend import TorchOperator

BACK_ENDS = get_args(BackEnd)


class BackEndError(ValueError):
    """The back end that was asked for cannot work here."""


def choose_operator(pool_RD: torch.Tensor, tables: SlotTables, sizes: Sizes, asked: BackEnd = "auto") -> Operator:
    """The back end for a pool on its device, ready to serve: what it compiles is compiled.

    Raises BackEndError if another device is needed for what was asked for.
    """
    device = pool_RD.device.type
    chosen = asked if asked != "auto" else {"cpu": "numba", "cuda": "triton"}.get(device, "torch")
    if chosen == "torch":
        return TorchOperator(pool_RD)
    if chosen == "numba":
        if device != "cpu":
            raise BackEndError(f"operator back end: found 'numba', which is for CPUs, and the model is on {device}")
        from perft.operator.cpu.backend import make_numba_operator

        return make_numba_operator(pool_RD, tables)
    if chosen == "triton":
        if device != "cuda":
            raise BackEndError(f"operator back end: found 'triton', which is for GPUs, and the model is on {device}")
        from perft.operator.gpu.backend import make_triton_operator

        return make_triton_operator(pool_RD, tables, sizes)
    raise BackEndError(f"operator back end: found {asked!r}, expected one of {BACK_ENDS}")
