"""Owns the geometry of one routed adapter (the paper's Figure 3): an R, Top2/8, trained on arithmetic, which is kept
beside the results, and what its routers and experts do on test problems."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.common.report import markdown
from benchmarks.quality import data
from benchmarks.quality.grid import METHODS, TUNING_SEED, Run, chosen_rate
from benchmarks.quality.places import BASE, BUILD, GEOMETRY
from perft.hf import PerftAdapter, attach, load, moe_blocks, read_config, save
from perft.hf.base import load_model, load_tokenizer
from perft.inspection.plots import Drawn
from perft.inspection.plots import draw as draw_vectors
from perft.inspection.routing import LayerRouting, routing_on

SHOWN = Run("small", "arithmetic", "R2of8", 4, seed=TUNING_SEED)
PROBLEMS = 100
LAYER = 2
MEASURED = "geometry.json"


def keep(results: Mapping[str, Any], runs: Path = BUILD / "runs") -> None:
    """Put the trained adapter, in bfloat16, and what was measured of it beside the results, if it is there."""
    folder = runs / SHOWN._replace(learning_rate=chosen_rate(results, SHOWN)).name
    if (folder / "adapter_config.json").is_file():
        model = load_model(str(BASE), torch.float32)
        adapter = attach(model, read_config(folder))
        load(adapter, folder)
        save(adapter, GEOMETRY, torch.bfloat16)
        (GEOMETRY / MEASURED).write_text(json.dumps(measured(ran()), indent=1) + "\n", encoding="utf-8")


class Ran(NamedTuple):
    """The adapter on its base, and its routing on `tokens` tokens of test problems."""

    model: Any
    adapter: PerftAdapter
    routing: dict[int, LayerRouting]
    tokens: int


def ran() -> Ran:
    model, tokenizer = load_model(str(BASE), torch.float32), load_tokenizer(str(BASE))
    adapter = attach(model, read_config(GEOMETRY))
    load(adapter, GEOMETRY)
    texts = [f"Question: {each.prompt}\nAnswer: {each.completion}"
             for each in data.items("arithmetic", "test", PROBLEMS)]  # fmt: skip
    return Ran(model, adapter, *routing_on(model, tokenizer, adapter, texts))


def draw(file: Path) -> None:
    of = ran()
    layers, routers = dict(of.adapter.by_layer()), moe_blocks(of.model)
    drawn = Drawn(
        f"{METHODS[SHOWN.method].label}, trained on arithmetic", "R", of.routing, of.tokens, LAYER,
        routers[LAYER].router_weight, layers[LAYER].weights(),
    )  # fmt: skip
    draw_vectors(file, drawn)


@torch.no_grad()
def measured(of: Ran) -> dict[str, Any]:
    """Its routing, and how its vectors lie to each other, by layer."""
    layers = []
    for index, layer in of.adapter.by_layer():
        routing, weights = of.routing[index], layer.weights()
        own, others = alignment(weights.router, weights.down_proj)
        nearest = F.normalize(weights.router, dim=1) @ F.normalize(moe_blocks(of.model)[index].router_weight, dim=1).T
        layers.append({
            "layer": index, **asdict(routing), "own_keys": own, "other_keys": others,
            "nearest_base_router": float(nearest.abs().max(dim=1).values.mean()),
        })  # fmt: skip
    return {"tokens": of.tokens, "layers": layers}


def told() -> str:
    """What was measured: a line for each layer."""
    found = json.loads((GEOMETRY / MEASURED).read_text(encoding="utf-8"))
    rows = [
        (
            str(each["layer"]), f"{each['entropy']:.2f}", str(len(each["dead"])), f"{each['overlap']:.2f}",
            f"{min(each['use_M']):.0%} to {max(each['use_M']):.0%}", f"{each['own_keys']:.2f}",
            f"{each['other_keys']:.2f}", f"{each['nearest_base_router']:.2f}",
        )
        for each in found["layers"]
    ]  # fmt: skip
    header = ("layer", "entropy of use", "dead experts", "overlap with the base's router", "use of an expert",
              "router and own keys", "router and other experts' keys", "router and nearest base router")  # fmt: skip
    return f"Over {found['tokens']:,} tokens of test problems:\n\n{markdown(header, rows)}"


@torch.no_grad()
def alignment(router_MD: torch.Tensor, keys_MBD: torch.Tensor) -> tuple[float, float]:
    """Mean absolute cosine of an expert's router vector and its own key vectors, and those of the other experts."""
    cosine_MMB = torch.einsum("md,nbd->mnb", F.normalize(router_MD, dim=1), F.normalize(keys_MBD, dim=2)).abs()
    is_own_MM = torch.eye(len(router_MD), dtype=torch.bool)
    return float(cosine_MMB[is_own_MM].mean()), float(cosine_MMB[~is_own_MM].mean())
