"""Owns reading a base that is named by its folder or on the hub: configuration, shape, model, tokenizer, fingerprint.

Everything raises InputError, with what was found and what to do.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from perft.base_model import BaseShape
from perft.checkpoint import checkpoint_fingerprint
from perft.errors import InputError
from perft.hf.blocks import UnsupportedModelError, shape_of
from perft.reading import read_json

ALWAYS_RENORMALIZED = ("mixtral", "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid")
"""Families whose router's weights always sum to 1; the others say so in their configuration."""


def load_config(name: str) -> Any:
    """The base's configuration. Code that a model brings along is never run."""
    from transformers import AutoConfig

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"found no config.json in the folder {name}, expected a model of Hugging Face transformers")
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"the folder {name} holds an adapter beside a model, and transformers would load both: move "
            "adapter_config.json and adapter_model.safetensors elsewhere"
        )
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"found no folder {name}: give the base as a folder, or by its name on the hub")
    if folder.is_dir():
        read_json(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers and the hub raise many kinds
        raise InputError(f"the base {name} cannot be read: {_first_line(error)}") from None


def on_meta(config: Any) -> tuple[Any, BaseShape]:
    """The base without its weights, and its shape."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = shape_of(model)
    except UnsupportedModelError as error:
        raise InputError(str(error)) from None
    except ValueError as error:
        raise InputError(f"transformers knows no language model of this kind: {_first_line(error)}") from None
    if not 1 <= shape.top_k <= shape.num_experts:
        raise InputError(f"the base's config.json: found top-k {shape.top_k} of {shape.num_experts} experts")
    return model, shape


def shape_on_meta(config: Any) -> BaseShape:
    """The shape of a base from its configuration alone."""
    return on_meta(config)[1]


def load_model(name: str, dtype: torch.dtype) -> Any:
    """The base, frozen, in evaluation mode. Every weight comes from its safetensors files: none is made up."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing is told below
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"the base {name} cannot be loaded: {_first_line(error)}") from None
    finally:
        logging.set_verbosity(before)
    missing = [f"{tensor}: missing in the checkpoint" for tensor in sorted(report["missing_keys"])]
    missing += [f"{found[0]}: another shape than config.json says" for found in sorted(report["mismatched_keys"])]
    if missing:
        raise InputError(f"the base {name} is not whole: copy it again, or mend its config.json", missing)
    if unused := sorted(report["unexpected_keys"]):
        print(f"the base {name}: {len(unused)} tensors are not used, such as {unused[0]}", file=sys.stderr)
    return model.requires_grad_(False).eval()


def load_tokenizer(name: str) -> Any:
    """The base's tokenizer, with a token to pad with."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        is_there = bool(tokenizer.encode("a", add_special_tokens=False))
    except Exception as error:  # tokenizers raise plain exceptions
        raise InputError(f"the tokenizer of {name} cannot be loaded: {_first_line(error)}") from None
    if not is_there:
        raise InputError(f"found no tokenizer in {name}, expected tokenizer.json or the files of another kind")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {name} has no end-of-text token, which every answer has to end with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fingerprint_of(name: str, shape: BaseShape) -> str | None:
    """docs/format.md's base_fingerprint of the checkpoint that was loaded, from its files; None if they do not say."""
    from huggingface_hub import snapshot_download

    folder = Path(name)
    try:
        if not folder.is_dir():
            folder = Path(snapshot_download(name, local_files_only=True))
        return checkpoint_fingerprint(folder, shape)
    except SafetensorError as error:
        raise InputError(f"a file of the base {name} is damaged: {_first_line(error)}: copy it again") from None
    except (OSError, ValueError):
        return None


def renormalizes(config: Any) -> bool:
    """Whether the base divides the weights of its selected experts by their sum."""
    if config.model_type in ALWAYS_RENORMALIZED:
        return True
    return bool(getattr(config.get_text_config(), "norm_topk_prob", False))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
