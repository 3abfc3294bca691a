"""Owns the adapters given at start (`--adapter NAME=PATH`): checked early, then brought into the store.

Content that is new to its name becomes the next version and the active one; content that the name has already changes
nothing, so that a restart undoes no rollback. Invariant: any failure refuses the start, with every reason.
"""

import logging
import shutil
from asyncio import to_thread
from dataclasses import dataclass
from pathlib import Path

from adapters.access import explained
from adapters.errors import InvalidAdapterError, StoreError
from adapters.format.beside import adapter_in
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE, Limits
from adapters.format.folder import check_handed_in
from perft.base_model import BaseShape
from server.auth.keys import Caller
from server.errors import ServerError, StartError
from server.registry.registry import Registry, name_problem
from server.registry.service import AdapterService
from server.uploads.validate import peft_type

logger = logging.getLogger(__name__)

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
        try:
            found, violations = check_handed_in(named.folder, base, limits)
        except PermissionError as error:
            problems.append(f"--adapter {named.name}: {explained(error)}")
            continue
        if peft_type(found.folder) == "LORA":
            violations = list(found.violations)
        if violations:
            problems.append(f"--adapter {named.name}: {InvalidAdapterError(str(named.folder), violations)}")
    if problems:
        raise StartError("\n".join(problems))


async def store_given_adapters(registry: Registry, service: AdapterService, folders: list[NamedFolder]) -> None:
    """Put every folder into the store, unless its name has that content, and print which of the two happened.

    Raises StartError with everything that is wrong.
    """
    problems: list[str] = []
    for named in folders:
        try:
            print(f"--adapter {named.name}: {await _store_one(registry, service, named)}", flush=True)
        except (OSError, ServerError, InvalidAdapterError, StoreError) as error:
            problems.append(f"--adapter {named.name}={named.folder}: {error}")
    if problems:
        raise StartError("\n".join(problems))


async def _store_one(registry: Registry, service: AdapterService, named: NamedFolder) -> str:
    """Returns what happened."""
    staged = await to_thread(service.stage)
    try:
        await to_thread(_copy, named.folder, staged)
        adapter, is_new = await service.upload(named.name, staged, True, AT_START, only_if_new=True)
    finally:
        await to_thread(service.discard, staged)
    assert adapter.uploaded is not None
    number = adapter.uploaded
    if not is_new:
        return f"nothing changed: this content is version {number} already, {_state(registry, named.name, number)}"
    keys = adapter.allowed_keys
    private = "" if keys is None else f"; for the keys {', '.join(keys) or '(none)'}, as this name was restricted"
    return f"new content: it is version {number} now, the active one{private}"


def _state(registry: Registry, name: str, number: int) -> str:
    """What a known version is now."""
    adapter = registry.adapter(name, AT_START)
    version = next(version for version in adapter.versions if version.version == number)
    if version.reason is not None:
        return f"which cannot be served ({version.reason})"
    if adapter.active == number:
        return "the active one"
    return f"and {'none' if adapter.active is None else f'version {adapter.active}'} is active"


def _copy(folder: Path, staged: Path) -> None:
    found = adapter_in(folder)
    for note in found.notes:
        logger.info("--adapter: %s: %s", found.folder, note)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(found.folder / name, staged / name)
