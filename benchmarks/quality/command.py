"""Owns the command line of the comparison."""

import argparse
import os
from pathlib import Path

import torch

from benchmarks.quality import __doc__ as about
from benchmarks.quality.data import TASKS
from benchmarks.quality.grid import LIKE_LORA


def main() -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    pretrain = commands.add_parser("pretrain", help="make the small OLMoE; goes on where it was stopped")
    pretrain.add_argument("--larger-minutes", type=float, metavar="N", help="make the larger one, so long, on a GPU")
    commands.add_parser("experts", help="measure how far the small OLMoE's experts differ")
    run = commands.add_parser("run", help="do the runs that have no result yet")
    run.add_argument("--base", choices=tuple(LIKE_LORA), help="runs on this base alone (default: all)")
    run.add_argument("--task", choices=TASKS, help="runs of this task alone (default: both)")
    run.add_argument("--minutes", type=float, default=24 * 60.0, help="begin no run after so long")
    run.add_argument("--at-once", type=int, default=1, metavar="N", help="so many runs beside each other (default: 1)")
    commands.add_parser(
        "mistakes", help="count where wrong answers go wrong, of the runs whose adapters are still there"
    )
    commands.add_parser("page", help="docs/quality.md and its pictures, from the result files")
    check = commands.add_parser("check", help="one tiny cell end to end; leaves nothing in the repository")
    check.add_argument("--output", type=Path, help="folder to work in (default: build/quality/check, made anew)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(19)
    {
        "pretrain": _pretrain, "experts": _experts, "run": _run, "mistakes": _mistakes, "page": _page, "check": _check,
    }[options.what](options)  # fmt: skip


def _pretrain(options: argparse.Namespace) -> None:
    from benchmarks.quality import wordnet
    from benchmarks.quality.base import Recipe, pretrain
    from benchmarks.quality.places import BASE, BUILD

    if options.larger_minutes is not None:
        from benchmarks.quality.larger import pretrain_larger

        pretrain_larger(60 * options.larger_minutes)
        return
    pretrain(wordnet.synsets(wordnet.folder()), Recipe(), BASE, BUILD / "pretraining")


def _experts(options: argparse.Namespace) -> None:
    import json

    from benchmarks.quality import experts, wordnet
    from benchmarks.quality.places import BASE, EXPERTS
    from perft.hf.base import load_model, load_tokenizer

    model, tokenizer = load_model(str(BASE), torch.float32), load_tokenizer(str(BASE))
    found = experts.measured(model, tokenizer, wordnet.synsets(wordnet.folder()))
    EXPERTS.parent.mkdir(parents=True, exist_ok=True)
    EXPERTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(EXPERTS.read_text(encoding="utf-8"))


def _run(options: argparse.Namespace) -> None:
    from benchmarks.quality.runs import run_all

    run_all(options.base, 60 * options.minutes, options.task, options.at_once)


def _mistakes(options: argparse.Namespace) -> None:
    import json

    from benchmarks.quality import mistakes
    from benchmarks.quality.places import MISTAKES
    from benchmarks.quality.runs import results

    kept = json.loads(MISTAKES.read_text(encoding="utf-8")) if MISTAKES.is_file() else {}
    found = dict(sorted({**kept, **mistakes.measured(results())}.items()))
    MISTAKES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _page(options: argparse.Namespace) -> None:
    from benchmarks.quality.page import write

    write()


def _check(options: argparse.Namespace) -> None:
    from benchmarks.quality.check import tiny_cell

    tiny_cell(options.output)
