"""Compiles every kernel that `TritonOperator.warm_up` launches, for a GPU that need not be there; prints what it takes.

    PYTHONPATH=.triton python -m tests.triton.compile_kernels 90 bfloat16 2048 64 [all]

Compute capability, dtype, hidden size, base experts; `all`: for every type of what a base may give. One JSON line a
kernel: its name and tile, and its shared memory in bytes. Triton must not interpret (a process with TRITON_INTERPRET=1
has no kernels to compile).
"""

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perft.operator.gpu import backend as triton_backend
from perft.operator.gpu.backend import TritonOperator
from perft.operator.tables import SlotTables

SYMBOLS = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages")


def main(capability: int, dtype: torch.dtype, hidden_size: int, base_experts: int, every_type: bool) -> None:
    seen: set[str] = set()

    def compile_instead(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in OPTIONS}
        source = source_of(kernel, arguments, constants)
        known = source.hash() if every_type else f"{kernel.fn.__name__} {constants}"
        if known not in seen:
            seen.add(known)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            tile = constants.get("TILE", constants.get("TOKENS"))
            print(json.dumps({"kernel": kernel.fn.__name__, "tile": tile, "shared": compiled.metadata.shared}))

    triton_backend.launch = compile_instead
    cpu = torch.device("cpu")
    for has_counts, base_top_k in ((True, 8), (False, 0)):
        tables = SlotTables(pages=64, layers=4, device=cpu)
        operator = TritonOperator(
            torch.zeros(1024, hidden_size, dtype=dtype), tables, max_tokens=1024, max_groups=32, width=2048,
            max_experts=32, base_experts=base_experts, base_top_k=base_top_k, has_logits=bool(base_top_k),
            counts=torch.zeros(64, max(32, base_experts), dtype=torch.int32) if has_counts else None,
        )  # fmt: skip
        operator.warm_up()


def source_of(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> ASTSource:
    """What Triton would compile for a launch with these arguments: it specialises on 1 and on multiples of 16."""
    names, signature, fixed, attributes = kernel.arg_names, {}, dict(constants), {}
    for i, (name, argument) in enumerate(zip(names, arguments, strict=False)):
        is_special = not kernel.params[i].do_not_specialize
        number = argument.data_ptr() if isinstance(argument, torch.Tensor) else argument
        if isinstance(argument, torch.Tensor):
            signature[name] = f"*{SYMBOLS[argument.dtype]}"
        elif argument == 1 and is_special:
            signature[name], fixed[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if number % 16 == 0 and is_special:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    assert signature.keys() == set(names), "a launch leaves an argument out"
    return ASTSource(kernel, {name: signature[name] for name in names}, constexprs=fixed, attrs=attributes)


if __name__ == "__main__":
    main(int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "all" in sys.argv[5:])
