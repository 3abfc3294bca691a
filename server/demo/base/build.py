"""Owns the demo base on disk, and the command that builds it, once.

Invariant: a folder under the final name is complete. It is built under a sibling name, checked against the dense
model it was made from, and renamed at the end; its marker names the layout and every file's size.
"""

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.demo.errors import DemoError, run_command

LAYOUT = 1
MARKER = "perft-demo-base.json"
MODEL_BYTES = 1_500_000_000
SPARE_BYTES = 200_000_000
LARGEST_DIFFERENCE = 1e-3
CHECK_PROMPTS = (
    "What is the capital of France?",
    "The sea was calm that morning, and the old fisherman",
    "def add(a, b):\n    return",
)


def default_folder() -> Path:
    """Where the demo base lives."""
    return cache_folder() / "demo-base"


def cache_folder() -> Path:
    """Where the demo keeps what it makes, outside any checkout: $PERFT_CACHE, else the user's cache folder."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return Path(os.environ.get("PERFT_CACHE") or cache_home / "perft").expanduser()


def is_built(folder: Path) -> bool:
    """Whether `folder` holds a complete demo base of this layout."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in marker["files"]}
        return bool(marker["layout"] == LAYOUT and sizes == marker["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def build(folder: Path) -> Path:
    """Build the demo base into `folder` unless it is there already; returns `folder`.

    Raises DemoError, one sentence, if it cannot be built; `folder` is then unchanged.
    """
    folder = folder.expanduser().absolute()
    if is_built(folder):
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    with disk_problems_explained(folder):
        refuse_foreign(folder)
        with only_builder(folder):
            if is_built(folder):
                return folder
            shutil.rmtree(unfinished, ignore_errors=True)
            check_space(folder.parent)
            try:
                write_base(unfinished)
                put_in_place(unfinished, folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return folder


@contextmanager
def disk_problems_explained(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a DemoError."""
    try:
        yield
    except OSError as problem:
        raise DemoError(f"cannot write the demo base to {folder}: {problem.strerror or problem}") from problem


def refuse_foreign(folder: Path) -> None:
    """Raises DemoError if `folder` is something that is not a demo base: it is never replaced."""
    if folder.exists() and not folder.is_dir():
        raise DemoError(f"found a file at {folder}, expected a folder for the demo base: choose another one")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise DemoError(f"found something in {folder} that is not a demo base: choose another folder")


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Make the parent folder and hold a lock in it: two builds never write the same files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another process is building the demo base: waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def check_space(parent: Path) -> None:
    """Raises DemoError, before the work starts, if the disk cannot hold the result."""
    needed, free = MODEL_BYTES + SPARE_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise DemoError(
            f"found {free / 1e9:.1f} GB free in {parent}, expected {needed / 1e9:.1f} GB for the demo base: make room"
        )


def write_base(folder: Path) -> None:
    """Write the demo base into the new `folder`, check it, and mark it as complete."""
    from server.demo.base import dense

    file = dense.gguf_file()
    folder.mkdir()
    started = time.monotonic()
    print("Building the demo base (once, about a minute)", flush=True)
    print("1/3 reading SmolLM2-135M-Instruct (about 25 s)", flush=True)
    model, tokenizer = dense.load(file)
    print("2/3 writing it as a Mixture-of-Experts: 30 layers of 4 experts, top 2, 1.5 GB (about 10 s)", flush=True)
    write_model(model, tokenizer, folder)
    print("3/3 checking that it computes the dense model's function (about 10 s)", flush=True)
    difference = largest_difference(model, tokenizer, folder)
    print(f"largest difference between two logits: {difference:.1e} (limit {LARGEST_DIFFERENCE:.0e})", flush=True)
    if not difference <= LARGEST_DIFFERENCE:
        raise DemoError(
            f"a logit of the demo base differs from the dense model's by {difference:.1e}; the base was discarded"
        )
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {"layout": LAYOUT, "source": f"{dense.PACKAGE} {dense.VERSION}", "files": sizes}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    print(f"built in {time.monotonic() - started:.0f} s", flush=True)


def write_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the upcycled model, its configuration, and its tokenizer with the chat template."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from server.demo.base.upcycle import mixtral_config, upcycled_tensors

    config = mixtral_config(model.config)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    dense = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weights = folder / "model.safetensors"
    try:
        save_file(upcycled_tensors(dense, config.hidden_size), weights, metadata={"format": "pt"})
    except SafetensorError as problem:
        raise OSError(str(problem)) from problem
    weights.chmod(0o644)  # safetensors makes it readable only by its owner


def largest_difference(model: Any, tokenizer: Any, folder: Path) -> float:
    """The largest difference between a logit of the dense model and the same logit of the model in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from server.demo.base.dense import without_progress_bars

    with without_progress_bars():
        upcycled: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        loaded_tokenizer = AutoTokenizer.from_pretrained(folder)
    differences = []
    with torch.inference_mode():
        for prompt in CHECK_PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            again = loaded_tokenizer(prompt, return_tensors="pt").input_ids
            if not torch.equal(ids, again):
                raise DemoError("the demo base's tokenizer, as written, gives other tokens; the base was discarded")
            differences.append((model(ids).logits - upcycled(again).logits).abs().max())
    return float(torch.stack(differences).max())


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Give the complete folder its final name, in place of one of an older layout."""
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.demo.base", description="Build the demo's base model, once."
    )
    parser.add_argument(
        "--output", type=Path, default=default_folder(), help="the folder to write (default: %(default)s)"
    )
    output: Path = parser.parse_args(arguments).output
    return run_command(lambda: print(f"demo base: {build(output)}"))
