"""Owns what the benchmarks ask for: adapters with random weights, prompts, and which request uses which adapter."""

from pathlib import Path
from typing import Any

import torch

from perft.base_model import BaseShape, base_of_config
from perft.config import AdapterConfig
from perft.operator.tables import adapter_rows
from tests.synthetic import RANDOM_R, write_adapter

PROMPT_TOKENS = 24

_ROUTED = ("top_k", "renormalize")


def shape_of(base: Path) -> BaseShape:
    """The shape of the base model in a folder, from its configuration alone. Raises ValueError for an unknown one."""
    from transformers import AutoConfig

    shape = base_of_config(AutoConfig.from_pretrained(base), torch.float32)
    if shape is None:
        raise ValueError(f"found a model of an unknown architecture in {base}, expected OLMoE, Mixtral or Qwen3-MoE")
    return shape


def vocabulary_of(base: Path) -> int:
    """Tokens that the base's configuration names."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(base).vocab_size)


def routed(experts: int = 4, top_k: int = 2, bottleneck: int = 16) -> dict[str, Any]:
    """PERFT-R in all layers. The defaults are the centre of the experiments."""
    return RANDOM_R | {"num_experts": experts, "top_k": top_k, "bottleneck": bottleneck}


def unrouted(variant: str, experts: int, bottleneck: int = 16) -> dict[str, Any]:
    """E (`experts` must be the base's), D or S (1)."""
    values = {key: value for key, value in routed(experts, 1, bottleneck).items() if key not in _ROUTED}
    return values | {"variant": variant}


def shapes(base: BaseShape) -> dict[str, dict[str, Any]]:
    """Every kind of adapter that is measured, by its name in the tables."""
    return {
        "R": routed(),
        "E": unrouted("E", base.num_experts),
        "D": unrouted("D", 4),
        "S": unrouted("S", 1),
        "R, bottleneck 4": routed(bottleneck=4),
        "R, bottleneck 64": routed(bottleneck=64),
        "R, M 4, K 1": routed(4, 1),
        "R, M 8, K 2": routed(8, 2),
        "R, M 16, K 4": routed(16, 4),
    }


def write(folder: Path, base: BaseShape, count: int, values: dict[str, Any]) -> list[Path]:
    """`count` random adapters, all different, as folders in the format of docs/format.md."""
    return [write_adapter(folder / str(seed), base, seed, values) for seed in range(count)]


def rows_of(base: BaseShape, values: dict[str, Any]) -> int:
    """Rows of the pool that one adapter takes."""
    return adapter_rows(AdapterConfig.model_validate(values), base.moe_layers)


def prompt(number: int, vocabulary: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    """Token ids of the prompt of request `number`; no two requests begin alike."""
    return [3 + (7919 * number + 31 * place + 1) % (vocabulary - 3) for place in range(tokens)]


def uniform(requests: int, adapters: int) -> list[int]:
    """The adapter's number of each request: they take turns."""
    return [number % adapters for number in range(requests)]


def zipf(requests: int, adapters: int) -> list[int]:
    """The n-th adapter gets 1/n as many requests as the first, each at least one, as far as whole requests allow."""
    total = sum(1 / rank for rank in range(1, adapters + 1))
    wanted = [requests / rank / total for rank in range(1, adapters + 1)]
    given = [1] * adapters
    for _ in range(requests - adapters):
        given[max(range(adapters), key=lambda number: wanted[number] - given[number])] += 1
    return [number for number, share in enumerate(given) for _ in range(share)]


def one_hot(requests: int, adapters: int) -> list[int]:
    """One adapter gets all the requests that the others, with one each, leave."""
    return [0] * (requests - adapters + 1) + list(range(1, adapters))


POPULARITIES = {"uniform": uniform, "zipf": zipf, "one hot": one_hot}


def assigned(requests: int, adapters: int, popularity: str = "uniform") -> list[int | None]:
    """The adapter's number of each request; None (the base) for all of them if there are no adapters."""
    return list(POPULARITIES[popularity](requests, adapters)) if adapters else [None] * requests
