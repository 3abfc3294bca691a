"""Owns the adapters given at start (`--adapter NAME=PATH`): checked early, then brought into the store.

Invariant: any failure refuses the start, with every reason.
"""

import shutil
from asyncio import to_thread
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import InvalidAdapterError, StoreError
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, Limits
from adapters.format.folder import check_folder
from perft.base_model import BaseShape
from server.auth.keys import Caller
from server.errors import ServerError, StartError
from server.registry.registry import Registry, name_problem
from server.registry.service import AdapterService
from server.uploads.validate import peft_type

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
        is_lora = peft_type(named.folder) == "LORA"
        _, violations = (None, []) if is_lora else check_folder(named.folder, base, limits)
        if violations:
            problems.append(f"--adapter {named.name}: {InvalidAdapterError(str(named.folder), violations)}")
    if problems:
        raise StartError("\n".join(problems))


async def store_given_adapters(registry: Registry, service: AdapterService, folders: list[NamedFolder]) -> None:
    """Put every folder into the store as a version of its name; of a name that was there, the active one stays.

    Raises StartError with everything that is wrong.
    """
    problems: list[str] = []
    known = {name for name in registry.names() if any(not v.is_draining for v in registry.versions(name))}
    for named in folders:
        try:
            await _store_one(service, named, named.name not in known)
        except (OSError, ServerError, InvalidAdapterError, StoreError) as error:
            problems.append(f"--adapter {named.name}={named.folder}: {error}")
    if problems:
        raise StartError("\n".join(problems))


async def _store_one(service: AdapterService, named: NamedFolder, activate: bool) -> None:
    staged = await to_thread(service.stage)
    try:
        await to_thread(_copy, named.folder, staged)
        await service.upload(named.name, staged, activate, AT_START)
    finally:
        await to_thread(service.discard, staged)


def _copy(folder: Path, staged: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(folder / name, staged / name)
