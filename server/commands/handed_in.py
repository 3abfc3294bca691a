"""Owns how `perft inspect` takes an adapter's folder: as `perft adapters push` does, beside what else lies in it.

Invariant: the files are judged (plain, of a size that is allowed) before one of them is opened.
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.format.files import CONFIG_FILE, DEFAULT_LIMITS, MAX_CONFIG_BYTES, WEIGHTS_FILE, Limits, file_violations
from perft.errors import InputError
from perft.reading import parse_json, printable, read_text

if TYPE_CHECKING:
    from perft.base_model import BaseShape
    from perft.config import AdapterConfig

SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class PerftFolder:
    """An adapter's folder, and its configuration; its weights are not checked yet (`check_weights_for`)."""

    folder: Path
    config: "AdapterConfig"


@dataclass(frozen=True)
class LoraFolder:
    """What a PEFT LoRA adapter says about itself, fit to print, its parameters, and the bytes of their file."""

    base: str
    rank: str
    modules: str
    parameters: int
    file_bytes: int


def read_handed_in(path: Path) -> PerftFolder | LoraFolder:
    """The adapter in somebody's folder. Raises InputError, with every problem that does not depend on the base."""
    from adapters.format.beside import adapter_in
    from adapters.format.config import parse_config
    from adapters.format.folder import check_handed_in

    if path.exists() and not path.is_dir():
        raise InputError(f"found a file at {path}, expected an adapter's folder")
    found = adapter_in(path)
    wrong = [*found.violations, *file_violations(found.folder, DEFAULT_LIMITS, are_others_allowed=True)]
    if wrong == [f"{CONFIG_FILE}: missing", f"{WEIGHTS_FILE}: missing"]:
        raise InputError(f"found no adapter in {path}, expected {CONFIG_FILE} and {WEIGHTS_FILE}")
    if wrong:
        raise InputError(f"{path} is no adapter", wrong)
    text = read_text(found.folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    values = parse_json(text, str(found.folder / CONFIG_FILE))
    kind = values.get("peft_type") if isinstance(values, dict) else None
    if kind == "LORA":
        return _lora(found.folder, values)
    if isinstance(kind, str) and kind.strip().upper() != "PERFT":
        raise InputError(f"{path}: found a PEFT adapter of the type {_short(kind)}, expected PERFT or LORA")
    config, wrong = parse_config(text.encode("utf-8"))
    if config is None or wrong:
        raise InputError(f"{path} is no adapter", check_handed_in(path, None)[1])
    return PerftFolder(found.folder, config)


def check_weights_for(handed_in: PerftFolder, base: "BaseShape", name: str) -> None:
    """Raises InputError with every way in which the adapter does not fit the base, but for its fingerprint."""
    from adapters.format.folder import check_handed_in

    _, wrong = check_handed_in(handed_in.folder, base, Limits(allow_other_base=True))
    if wrong:
        raise InputError(f"{handed_in.folder} is no adapter for {name}", wrong)


def _lora(folder: Path, values: dict[str, Any]) -> LoraFolder:
    from adapters.format.header import UnreadableWeightsError, opened

    rank, modules = values.get("r"), values.get("target_modules")
    if type(rank) is not int or not isinstance(modules, list | str):
        raise InputError(
            f"{folder} is no adapter",
            [f"peft_type LORA: found r {_short(rank)} and target_modules {_short(modules)}, expected both"],
        )
    try:
        with opened(folder / WEIGHTS_FILE) as (_, header):
            parameters = sum(prod(tensor.shape) for tensor in header.tensors)
    except UnreadableWeightsError as error:
        raise InputError(f"{folder} is no adapter", [str(error)]) from None
    return LoraFolder(
        base=_short(values.get("base_model_name_or_path")),
        rank=_short(rank),
        modules=_short(modules),
        parameters=parameters,
        file_bytes=(folder / WEIGHTS_FILE).stat().st_size,
    )


def _short(value: object) -> str:
    """A value of a foreign configuration, to be printed."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text[:SHOWN_CHARACTERS])
