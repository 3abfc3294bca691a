"""Owns the command `perft inspect`: what an adapter's folder holds, and what its routing does.

Invariant: exit 0 means everything asked for was shown, 1 that it was not, with the reason on stderr, 2 wrong usage.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perft.errors import InputError
from server.commands.report import reported


def run(arguments: list[str]) -> int:
    """Run `perft inspect ARGUMENTS` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="perft inspect",
        description="Show an adapter's sizes; with --prompts, how its experts are used on texts of yours.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder")
    parser.add_argument("--base", metavar="MODEL", help="default: the one that the adapter's configuration names")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text for each line; runs the base on them")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw use and geometry (needs matplotlib)")
    parser.add_argument("--layer", type=int, metavar="N", help="whose geometry is drawn (default: the middle one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(arguments)
    return reported("perft inspect", lambda: _inspect(given))


def _inspect(given: argparse.Namespace) -> None:
    from adapters.errors import InvalidAdapterError
    from adapters.format.folder import read_folder
    from perft.config import AdapterConfig
    from perft.hf.base import load_config, on_meta
    from perft.inspection.figures import base_figures, figures, told

    texts = _texts(given.prompts) if given.prompts is not None else []
    name = given.base or _base_of(given.adapter)
    model, shape = on_meta(load_config(name))
    try:
        checked = read_folder(given.adapter, shape)
    except InvalidAdapterError as error:
        raise InputError(f"{given.adapter} is no adapter for {name}", list(error.violations)) from None
    config: AdapterConfig = checked.config
    own, base = figures(config, shape), base_figures(model, shape)
    weights = checked.layer_weights(shape)
    routing, tokens, routers = _routing(name, given.adapter, config, texts, needs_base=given.plot is not None)
    if given.json:
        found = {"figures": asdict(own), "base": asdict(base), "tokens": tokens}
        print(json.dumps(found | {"routing": {layer: asdict(each) for layer, each in routing.items()}}, indent=1))
    else:
        for label, value in told(config, own, base):
            print(f"{label:22}{value}")
        if texts:
            _print_routing(routing, tokens)
    if given.plot is not None:
        layer = given.layer if given.layer is not None else sorted(weights)[len(weights) // 2]
        if layer not in weights:
            raise InputError(f"--layer: found {layer}, and the adapter is in the layers {sorted(weights)}")
        _plot(given.plot, given.adapter.name, routing, layer, routers[layer], weights[layer])


def _base_of(adapter: Path) -> str:

    try:
        return str(json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"])
    except (KeyError, ValueError, TypeError):
        raise InputError(f"{adapter} does not name its base: give it with --base") from None


def _texts(file: Path) -> list[str]:

    texts = [line for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not texts:
        raise InputError(f"found no text in {file}, expected one a line")
    return texts


def _routing(name: str, folder: Path, config: Any, texts: list[str], needs_base: bool) -> tuple[Any, int, Any]:
    """The routing on the texts, their tokens, and the base's routers by layer; the model is loaded only if needed."""
    if not texts and not needs_base:
        return {}, 0, {}
    import torch

    from perft.hf import attach, load, moe_blocks
    from perft.hf.base import load_model, load_tokenizer
    from perft.inspection.routing import routing_on

    model = load_model(name, torch.float32)
    routers = {layer: block.router_weight for layer, block in moe_blocks(model).items()}
    if not texts:
        return {}, 0, routers
    adapter = attach(model, config.model_copy(update={"base_fingerprint": None}))
    load(adapter, folder)
    routing, tokens = routing_on(model, load_tokenizer(name), adapter, texts)
    return routing, tokens, routers


def _print_routing(routing: Any, tokens: int) -> None:
    if not routing:
        print("\nevery expert is always on: there is no routing to show")
        return
    print(f"\nover {tokens:,} tokens; entropy 1: all experts alike; overlap with the base's router 0: independent\n")
    print(f"{'layer':>5}  {'entropy':>7}  {'overlap':>7}  {'dead':>4}  use by expert")
    for layer, each in sorted(routing.items()):
        overlap = "" if each.overlap is None else f"{each.overlap:.2f}"
        shown = " ".join(f"{share:.2f}" for share in each.use_M[:16]) + (" ..." if len(each.use_M) > 16 else "")
        print(f"{layer:>5}  {each.entropy:>7.2f}  {overlap:>7}  {len(each.dead):>4}  {shown}")


def _plot(output: Path, title: str, routing: Any, layer: int, router_ND: Any, weights: Any) -> None:

    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'perft-server[train]'") from None
    matplotlib.use("Agg")
    from perft.inspection.plots import draw

    draw(output, title, routing, layer, router_ND, weights)
    print(f"drawn: {output}")
