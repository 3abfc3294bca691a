"""Owns bringing the adapters given at start into the catalog. Any failure refuses the start, with every reason."""

import json
import shutil
from asyncio import to_thread
from dataclasses import dataclass
from pathlib import Path

from adapters import InvalidAdapterError, Limits, check_folder
from adapters.folder import CONFIG_FILE, WEIGHTS_FILE
from perft.base import BaseShape
from server.catalog import Catalog
from server.engine import EngineStatus
from server.errors import ApiError, StartError
from server.keys import Caller
from server.names import name_problem

AT_START = Caller("--adapter", True)


@dataclass(frozen=True)
class NamedFolder:
    """`--adapter NAME=PATH`."""

    name: str
    folder: Path


def parse_named_folders(given: list[str], base_names: list[str]) -> list[NamedFolder]:
    """The `--adapter` flags. Raises StartError with everything wrong about them."""
    folders: list[NamedFolder] = []
    problems: list[str] = []
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not path:
            problems.append(f"--adapter {item}: expected NAME=PATH")
        elif problem := name_problem(name, base_names):
            problems.append(f"--adapter {item}: {problem}")
        elif name in (named.name for named in folders):
            problems.append(f"--adapter {item}: the name {name!r} is given twice")
        else:
            folders.append(NamedFolder(name, Path(path).absolute()))
    if problems:
        raise StartError("\n".join(problems))
    return folders


def check_folders(folders: list[NamedFolder], base: BaseShape | None, limits: Limits) -> None:
    """Check every PERFT folder as far as `base` is known. Raises StartError with every violation of every adapter.

    PEFT LoRA adapters are checked once the engine's own settings are known.
    """
    problems: list[str] = []
    for named in folders:
        _, violations = (None, []) if _is_peft_lora(named.folder) else check_folder(named.folder, base, limits)
        if violations:
            problems.append(f"--adapter {named.name}: {InvalidAdapterError(str(named.folder), violations)}")
    if problems:
        raise StartError("\n".join(problems))


def check_status(status: EngineStatus) -> None:
    """Raises StartError unless every rank carries the operator."""
    if status.moe_layers == 0 or status.base is None:
        raise StartError(f"the engine carries PERFT's operator on no MoE layer: {status.problem}")


async def serve_at_start(catalog: Catalog, folders: list[NamedFolder]) -> None:
    """Put every folder into the store as a version of its name; of a name that was there, the active one stays.

    Raises StartError with everything that is wrong.
    """
    problems: list[str] = []
    known = set(catalog.names())
    for named in folders:
        staged = await to_thread(_copy, named.folder, catalog)
        try:
            await catalog.upload(named.name, staged, named.name not in known, AT_START)
        except ApiError as error:
            listed = "".join(f"\n  - {violation}" for violation in error.violations or ())
            problems.append(f"--adapter {named.name}={named.folder}: {error.message}{listed}")
        finally:
            await to_thread(catalog.discard, staged)
    if problems:
        raise StartError("\n".join(problems))


def _copy(folder: Path, catalog: Catalog) -> Path:
    """A copy of the adapter's two files inside the store."""
    try:
        staged = catalog.stage()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(folder / name, staged / name)
    except (OSError, ApiError) as error:
        raise StartError(f"--adapter ...={folder}: cannot be copied into the store ({error})") from error
    return staged


def _is_peft_lora(folder: Path) -> bool:
    try:
        values = json.loads((folder / CONFIG_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("peft_type") == "LORA"
