"""Owns the command line of the comparison."""

import argparse
import os

import torch

from benchmarks.quality import __doc__ as about
from benchmarks.quality import wordnet
from benchmarks.quality.base import Recipe, pretrain
from benchmarks.quality.places import BASE, BUILD


def main() -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pretrain",))
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(19)
    if options.what == "pretrain":
        pretrain(wordnet.synsets(wordnet.folder()), Recipe(), BASE, BUILD / "pretraining")
