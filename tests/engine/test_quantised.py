"""A base with int8 experts: adapters get the unquantised input, and their delta is added to the quantised output.

vLLM quantises, routes and calls its int8 kernel as on a CPU with AMX. Its arithmetic alone is done here by torch:
this kernel, like vLLM's other quantised ones for x86, runs on AMX tiles only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.fused_moe.experts import cpu_moe
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from perft.engine.layer_classes import PerftRoutedExperts
from perft.reference import BaseRouting, LayerWeights, reference_delta
from perft.routing import weights_by_expert
from tests import tiny
from tests.engine.engines import TinyEngine, prompts, start

CASES = {"R": 0, "E": 2, "D": 4, "S": 6, "base_slot": 9}
BFLOAT16 = torch.finfo(torch.bfloat16).eps


def int8_experts(
    out: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor,
    topk_ids: torch.Tensor, method: Any, w1_scale: torch.Tensor, w2_scale: torch.Tensor, *unused: Any,
) -> None:  # fmt: skip
    """What `fused_experts_cpu` computes, but for the rounding of activations to int8.

    hidden_states [T, D], w1 [N, 2I, D] and w2 [N, D, I] int8 with scales per output channel -> out [T, D].
    """
    assert w1.dtype == w2.dtype == torch.int8
    x_TD, sum_TD = hidden_states.float(), torch.zeros(out.shape)
    for n in range(w1.shape[0]):
        weight_T = torch.where(topk_ids == n, topk_weights.float(), 0.0).sum(1)
        gate_TI, up_TI = F.linear(x_TD, w1[n].float() * w1_scale[n, :, None]).chunk(2, dim=1)
        sum_TD += weight_T[:, None] * F.linear(F.silu(gate_TI) * up_TI, w2[n].float() * w2_scale[n, :, None])
    out.copy_(sum_TD)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_moe.CPUExpertsInt8, "_supports_current_device", staticmethod(lambda: True))
        patch.setattr(cpu_moe.CPUExpertsInt8, "process_weights_after_loading", lambda self, layer: None)
        patch.setattr(cpu_moe, "fused_experts_cpu", int8_experts)
        folder = tmp_path_factory.mktemp("quantised")
        running = start("mixtral", folder, dtype="bfloat16", quantization="int8_per_channel_weight_only")
        yield running
        running.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@contextmanager
def every_layer(check: Any) -> Iterator[None]:
    """Call `check(layer, x, base router, quantised output, our output)` wherever experts run."""
    ours = PerftRoutedExperts.forward_modular

    def both(self: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, **kwargs: Any) -> Any:
        kept_TD, logits_TN = x.clone(), self.perft.logits_TN
        base_TD = RoutedExperts.forward_modular(self, x.clone(), topk_weights, topk_ids, **kwargs).clone()
        output_TD = ours(self, x, topk_weights, topk_ids, **kwargs)
        if logits_TN is not None:
            routing = BaseRouting(logits_TN, weights_by_expert(topk_weights, topk_ids, logits_TN.shape[1]))
            check(self, kept_TD, routing, base_TD, output_TD)
        return output_TD

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerftRoutedExperts, "forward_modular", both)
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_an_adapters_delta_is_the_references(quantised: TinyEngine, case: int) -> None:
    adapter = tiny.attach_random(quantised.reference, quantised.cases[case], seed=100 + case)
    adapter.detach_from_model()
    layers = dict(adapter.by_layer())
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}

    def check(
        layer: Any, x_TD: torch.Tensor, routing: BaseRouting, base_TD: torch.Tensor, output_TD: torch.Tensor
    ) -> None:
        number = layer.perft.layer
        assert layer.w13_weight.dtype == layer.w2_weight.dtype == torch.int8 and x_TD.dtype == torch.bfloat16
        served = [None if w is None else w.bfloat16() for w in vars(layers[number].weights()).values()]
        expected_TD = reference_delta(adapter.config, LayerWeights(*served), x_TD, routing)
        seen.setdefault(number, []).append((base_TD.float(), output_TD.float(), expected_TD))

    with every_layer(check):
        quantised.generate([(prompt, case) for prompt in prompts(3, seed=50)], tokens=4)
    assert seen.keys() == layers.keys()
    for base_TD, output_TD, expected_TD in (step for steps in seen.values() for step in steps):
        bound = 4 * BFLOAT16 * float(base_TD.abs().max() + expected_TD.abs().max())
        assert expected_TD.abs().max() > 8 * bound, "too small to be told from rounding"
        torch.testing.assert_close(output_TD - base_TD, expected_TD, rtol=0.0, atol=bound)


def test_base_tokens_beside_adapters_are_the_quantised_bases_own(quantised: TinyEngine) -> None:
    changed, same = [0], [0]

    def check(layer: Any, x_TD: torch.Tensor, routing: Any, base_TD: torch.Tensor, output_TD: torch.Tensor) -> None:
        rows_T = (base_TD != output_TD).any(dim=1)
        changed[0] += int(rows_T.sum())
        same[0] += int((~rows_T).sum())

    alone = quantised.generate([(prompt, None) for prompt in prompts(6, seed=51)], tokens=8)
    with every_layer(check):
        requests = [(prompt, None if i % 2 else CASES["E"]) for i, prompt in enumerate(prompts(6, seed=51))]
        mixed = quantised.generate(requests, tokens=8)
    assert changed[0] > 0 and same[0] > 0
    for i in (1, 3, 5):
        assert mixed[i].outputs[0].token_ids == alone[i].outputs[0].token_ids
