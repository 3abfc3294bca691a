"""Owns the command `perft inspect`: what an adapter's folder holds, and what its routing does.

Invariants: exit 0 means everything asked for was shown, 1 that it was not, with the reason on stderr, 2 wrong usage.
What can be judged without running the base is judged before it is loaded.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perft.errors import InputError
from perft.reading import printable, read_text
from server.commands.handed_in import LoraFolder, PerftFolder, check_weights_for, read_handed_in
from server.commands.report import reported

if TYPE_CHECKING:
    from perft.base_model import BaseShape
    from perft.config import AdapterConfig
    from perft.inspection.routing import LayerRouting

TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class Ran:
    """What running the base gave: the routing by layer, over so many tokens, and the base's routers [N, D] by layer."""

    routing: "Mapping[int, LayerRouting]"
    tokens: int
    routers: Mapping[int, Any]


def run(arguments: list[str]) -> int:
    """Run `perft inspect ARGUMENTS` and return the exit status. Wrong usage raises SystemExit(2)."""
    parser = argparse.ArgumentParser(
        prog="perft inspect",
        description="Show an adapter's sizes; with --prompts, how its experts are used on texts of yours.",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="the adapter's folder")
    parser.add_argument("--base", metavar="MODEL", help="default: the one that the adapter's configuration names")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text for each line; runs the base on them")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw use and geometry (.png, .pdf or .svg)")
    parser.add_argument("--layer", type=int, metavar="N", help="whose geometry is drawn (default: the middle one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.parse_args(arguments)
    if given.layer is not None and given.plot is None:
        parser.error("--layer: it belongs to --plot OUT.png")
    return reported("perft inspect", lambda: _inspect(given))


def _inspect(given: argparse.Namespace) -> None:
    texts = _texts(given.prompts) if given.prompts is not None else []
    if given.plot is not None:
        _check_plot(given.plot)
    found = read_handed_in(given.adapter)
    if isinstance(found, LoraFolder):
        _show_lora(given, found)
    else:
        _show_perft(given, found, texts)


def _show_lora(given: argparse.Namespace, found: LoraFolder) -> None:
    if given.prompts is not None or given.plot is not None:
        raise InputError(f"{given.adapter} is a PEFT LoRA adapter, without experts: leave out --prompts and --plot")
    if given.json:
        print(json.dumps({"peft_type": "LORA"} | asdict(found), indent=1))
        return
    _print_rows(
        [
            ("adapter", f"PEFT LoRA of rank {found.rank} on {found.modules}: no experts, and no routing to show"),
            ("base", found.base),
            ("parameters", f"{found.parameters:,} ({found.file_bytes / 1e6:.2f} MB in the file)"),
        ]
    )


def _show_perft(given: argparse.Namespace, found: PerftFolder, texts: list[str]) -> None:
    from adapters.format.load import load_layers
    from perft.hf.base import fingerprint_of, load_config, on_meta
    from perft.inspection.figures import base_figures, figures, told
    from perft.inspection.routing import TOKENS_PER_EXPERT

    config = found.config
    name = given.base or config.base_model_name_or_path
    if not name:
        raise InputError(f"{given.adapter} does not name its base: give it with --base")
    model, shape = on_meta(load_config(name))
    fingerprint = fingerprint_of(name, shape)
    _check_base(given, config, name, fingerprint)
    check_weights_for(found, shape, name)
    layer = _layer(given.layer, config, shape)
    ran = Ran({}, 0, {})
    if texts or given.plot is not None:
        ran = _run(given, name, found, texts, fingerprint)
    own, base = figures(config, shape), base_figures(model, shape)
    if given.json:
        shown = {"figures": asdict(own), "base": asdict(base), "tokens": ran.tokens}
        shown |= {"enough_tokens": TOKENS_PER_EXPERT * config.num_experts}
        shown |= {"base_fingerprint": {"adapter": config.base_fingerprint, "base": fingerprint}}
        shown |= {"routing": {index: asdict(each) for index, each in ran.routing.items()}}
        print(json.dumps(shown, indent=1))
    else:
        _print_rows([*told(config, own, shape, base), *_base_rows(config, name, fingerprint)])
        if texts:
            _print_routing(config, ran)
    if given.plot is not None:
        weights = load_layers(found.folder, config, shape)[layer]
        _plot(given, config, shape, ran, layer, weights)


def _texts(file: Path) -> list[str]:
    texts = [line for line in read_text(file).splitlines() if line.strip()]
    if not texts:
        raise InputError(f"found no text in {file}, expected one a line")
    return texts


def _check_plot(output: Path) -> None:
    """Raises InputError unless a picture of that name can be drawn and written."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'perft-server[train]'") from None
    from perft.inspection.plots import ENDINGS

    matplotlib.use("Agg")
    if output.suffix.lower() not in ENDINGS:
        raise InputError(f"--plot: found {output}, expected a name that ends in {', '.join(ENDINGS)}")
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: No such file or directory: {output.parent}")
    if output.exists() and not output.is_file():
        raise InputError(f"cannot write {output}: found something else than a file there")
    needed = output if output.exists() else output.parent
    if not os.access(needed, os.W_OK):
        raise InputError(f"cannot write {output}: Permission denied")


def _check_base(given: argparse.Namespace, config: "AdapterConfig", name: str, fingerprint: str | None) -> None:
    """Raises InputError if --base is not the base that the adapter was trained on."""
    if given.base is None or not _differs(config, fingerprint):
        return
    named = config.base_model_name_or_path
    raise InputError(
        f"{given.adapter} was trained on another base than {name}: give that one with --base",
        [
            f"the adapter: base_fingerprint {config.base_fingerprint}, and it names the base {printable(named)}",
            f"{name}: base_fingerprint {fingerprint}",
        ],
    )


def _differs(config: "AdapterConfig", fingerprint: str | None) -> bool:
    mine = config.base_fingerprint
    return mine is not None and fingerprint is not None and mine.lower() != fingerprint


def _layer(asked: int | None, config: "AdapterConfig", shape: "BaseShape") -> int:
    """The layer whose geometry is drawn."""
    layers = config.layer_indices(shape.moe_layers)
    if asked is None:
        return layers[len(layers) // 2]
    if asked not in layers:
        raise InputError(f"--layer: found {asked}, and the adapter is in the layers {list(layers)}")
    return asked


def _run(
    given: argparse.Namespace, name: str, found: PerftFolder, texts: list[str], fingerprint: str | None
) -> Ran:  # fmt: skip
    import torch

    from perft.hf import attach, load, moe_blocks, shape_of
    from perft.hf.base import load_model, load_tokenizer
    from perft.inspection.routing import routing_on

    model = load_model(name, torch.float32)
    if fingerprint is None:
        _check_base(given, found.config, name, shape_of(model).fingerprint)
    routers = {layer: block.router_weight for layer, block in moe_blocks(model).items()}
    if not texts:
        return Ran({}, 0, routers)
    adapter = attach(model, found.config.model_copy(update={"base_fingerprint": None}))  # judged above
    load(adapter, found.folder)
    routing, tokens = routing_on(model, load_tokenizer(name), adapter, texts)
    if not tokens:
        raise InputError(f"the tokenizer of {name} finds no token in {given.prompts}")
    return Ran(routing, tokens, routers)


def _base_rows(config: "AdapterConfig", name: str, fingerprint: str | None) -> list[tuple[str, str]]:
    mine = config.base_fingerprint or "not given"
    if _differs(config, fingerprint):
        mine += f", and this base has {fingerprint}: the adapter was trained on another one"
    return [("base", printable(name)), ("base_fingerprint", mine)]


def _print_rows(rows: list[tuple[str, str]]) -> None:
    for label, value in rows:
        print(f"{label:22}{value}")


def _print_routing(config: "AdapterConfig", ran: Ran) -> None:
    from perft.inspection.tables import routing_table

    if ran.routing:
        print("", *routing_table(ran.routing, ran.tokens, config.num_experts), sep="\n")
    else:
        print("\nevery expert is always on: there is no routing to show")


def _plot(
    given: argparse.Namespace, config: "AdapterConfig", shape: "BaseShape", ran: Ran, layer: int, weights: Any
) -> None:  # fmt: skip
    from perft.inspection.figures import in_words
    from perft.inspection.plots import Drawn, draw

    name = printable(given.adapter.resolve().name)[:TITLE_CHARACTERS]
    title = f"{name}: {in_words(config, shape)}"
    draw(given.plot, Drawn(title, config.variant, ran.routing, ran.tokens, layer, ran.routers[layer], weights))
    print(f"drawn: {given.plot}", file=sys.stderr)
