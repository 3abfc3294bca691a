"""PERFT on a Hugging Face model: attach an adapter, train it with any loop, save it, load it again.

model = AutoModelForCausalLM.from_pretrained(...)
adapter = attach(model, config)         # the base is frozen, the adapter's parameters train
...
save(adapter, folder)                   # docs/format.md's two files
"""

from perft.hf.adapter import PerftAdapter, attach
from perft.hf.blocks import MoeBlock, UnsupportedModelError, moe_blocks, shape_of
from perft.hf.files import load, read_config, save
from perft.hf.layer import PerftLayer
from perft.hf.trainable import TrainableAdapter

__all__ = [
    "MoeBlock", "PerftAdapter", "PerftLayer", "TrainableAdapter", "UnsupportedModelError", "attach", "load",
    "moe_blocks", "read_config", "save", "shape_of",
]  # fmt: skip
