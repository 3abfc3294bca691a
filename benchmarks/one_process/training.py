"""What a training step costs: PERFT beside PEFT's qvLoRA at equal activated parameters, and the base's forward pass.

    python -m benchmarks.one_process.training [--rounds 8] [--tokens 64] [--batch 8]

One model in one process, on which the methods take turns; a step is forward and backward of one batch of random tokens,
the loss over all of them, without the optimizer (the same few million numbers for both).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.peft_lora import activated_parameters, equal_rank
from benchmarks.common.report import Report, base_of, parser
from benchmarks.common.rounds import measured, ratios, spread
from benchmarks.common.workload import routed, shape_of, unrouted, vocabulary_of
from perft.config import AdapterConfig
from perft.hf import PerftAdapter, attach, moe_blocks

STEPS = 2
FORWARD = "base, forward only"


def step(model: Any, ids: torch.Tensor) -> None:
    """Forward and backward of one batch."""
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()


def forward(model: Any, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)


def seconds(work: Callable[[], None]) -> float:
    """The median time of a few calls."""
    found = []
    for _ in range(STEPS):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


class Methods:
    """The ways of training on one base, each a call that takes the steps and returns their median seconds."""

    def __init__(self, base: Path, batch: int, tokens: int) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        shape = shape_of(base)
        self.kinds = {"R": routed(), "E": unrouted("E", shape.num_experts), "S": unrouted("S", 1)}
        self.activated = {name: activated_parameters(shape, values) for name, values in self.kinds.items()}
        rank = equal_rank(base, shape, routed())
        self.lora_label = f"qvLoRA, rank {rank}"
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self._adapters = {name: self._detached(values) for name, values in self.kinds.items()}
        lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
        self._lora = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora)
        vocabulary = vocabulary_of(base)
        self._ids = torch.randint(3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))

    def calls(self) -> dict[str, Callable[[], float]]:
        """Label -> seconds of a step."""
        return {
            FORWARD: lambda: seconds(lambda: forward(self._model, self._ids)),
            self.lora_label: lambda: seconds(lambda: step(self._lora, self._ids)),
            **{name: partial(self._with_adapter, name) for name in self.kinds},
        }

    def _detached(self, values: dict[str, Any]) -> PerftAdapter:
        adapter = attach(self._model, AdapterConfig.model_validate(values))
        adapter.detach_from_model()
        return adapter

    def _with_adapter(self, name: str) -> float:
        self._adapters[name].attach_to(moe_blocks(self._model))
        found = seconds(lambda: step(self._model, self._ids))
        self._adapters[name].detach_from_model()
        return found


def tell(report: Report, found: dict[str, list[float]], lora: str) -> None:
    rows = [[lora, spread(found[lora]).shown(3), "1"]]
    for name, values in ratios(found, lora).items():
        ratio = report.compare(f"{name} / qvLoRA", values)
        rows.append([name, spread(found[name]).shown(3), ratio.shown(3)])
    report.table("Seconds of a training step", ("method", "s, median (range)", "/ qvLoRA"), rows)
    report.raw["seconds"] = found


def main() -> None:
    made = parser(__doc__, rounds=8)
    made.add_argument("--tokens", type=int, default=64, help="tokens of an example")
    made.add_argument("--batch", type=int, default=8, help="examples of a step")
    options = made.parse_args()
    report, methods = Report("training", options), Methods(base_of(options), options.batch, options.tokens)
    calls = methods.calls()
    rounds = 1 if options.quick else options.rounds
    found = measured(list(calls), rounds, lambda name: calls[name](), options.seed, "s")
    tell(report, found, methods.lora_label)
    report.raw["activated"] = methods.activated
    report.write()


if __name__ == "__main__":
    main()
