"""Run as a program: a tiny model behind a compiled vLLM, with or without PERFT; what Dynamo traced, and the answers.

vLLM turns compilation off on CPUs where LoRA is on, and its CPU path traces through the MoE op; on a GPU neither is so.
Both are undone here, so that what is compiled is what would be on a GPU. No compiler is needed: the traced graph runs
as it is.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def compile_with_lora() -> None:
    """Undo vLLM's rule for CPUs."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def without_lora(cls: Any, vllm_config: Any) -> None:
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        check(cls, vllm_config)
        vllm_config.lora_config = lora

    CpuPlatform.check_and_update_config = classmethod(without_lora)


def opaque_experts() -> None:
    """Have plain vLLM run its experts in the opaque op on the CPU, too."""
    import torch
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    MoERunner._select_forward = lambda _self: torch.ops.vllm.moe_forward


def main(kind: str, folder: str, with_perft: str, output: str) -> None:
    os.environ["VLLM_PLUGINS"] = "perft" if with_perft == "yes" else ""
    from tests import tiny
    from tests.engine import engines
    from tests.engine.graph_keeper import GRAPHS

    compile_with_lora()
    backend = {"compilation_config": {"mode": 2, "backend": "tests.engine.graph_keeper.keep"}, "enforce_eager": False}
    if with_perft == "yes":
        engine = engines.start(kind, Path(folder), **backend)
        requests = [
            (prompt, None if i % 3 == 0 else i % len(engine.cases)) for i, prompt in enumerate(engines.prompts(12))
        ]
        for (_, case), answer in zip(requests, engine.generate(requests, tokens=16), strict=True):
            engine.check(case, answer)
        answers = len(requests)
    else:
        opaque_experts()
        tiny.build(kind, Path(folder) / kind)
        with engines.environment(**engines.ENVIRONMENT):
            llm = engines.LLM(**engines.settings(Path(folder) / kind) | backend)
        llm.generate([{"prompt_token_ids": p} for p in engines.prompts(2)], engines.greedy(4), use_tqdm=False)
        answers = 2
    Path(output).write_text(json.dumps({"graphs": GRAPHS, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
