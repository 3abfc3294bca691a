"""Adapters as bytes, with their digests, to be uploaded over and over."""

from collections.abc import Sequence
from pathlib import Path

from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.format.folder import read_folder
from perft.base_model import BaseShape
from tests.server import tiny_server
from tests.server.fakes import BASE as FAKE_BASE
from tests.store_contents import Content
from tests.synthetic import RANDOM_R, write_adapter

BOTTLENECKS = (1, 1, 2, 2, 4, 256)
"""Of the adapters for the fake engine; the last one is large enough to be cut off in its middle."""


def content_of(folder: Path, base: BaseShape) -> Content:
    """A PERFT adapter's folder as bytes."""
    config, weights = (folder / CONFIG_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()
    return Content("PERFT", config, weights, read_folder(folder, base).digest)


def for_the_fake_engine(folder: Path) -> Sequence[Content]:
    """As many adapters as there are BOTTLENECKS; they differ in size."""
    return [
        content_of(write_adapter(folder / str(seed), FAKE_BASE, seed, RANDOM_R | {"bottleneck": bottleneck}), FAKE_BASE)
        for seed, bottleneck in enumerate(BOTTLENECKS)
    ]


def for_the_tiny_model(folder: Path, count: int) -> Sequence[Content]:
    """Adapters whose effect on the tiny model is strong."""
    return [content_of(tiny_server.adapter(folder / str(seed), seed), tiny_server.BASE) for seed in range(count)]
