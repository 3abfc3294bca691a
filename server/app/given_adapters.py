"""Owns how the adapters given at start (`--adapter NAME=PATH`, or a URL) come into the store.

Content that is new to its name becomes the next version and the active one; content that the name has already changes
nothing, so that a restart undoes no rollback. Invariant: any failure refuses the start, with every reason.
"""

import logging
import shutil
from asyncio import to_thread
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.errors import InvalidAdapterError, StoreError
from adapters.format.beside import adapter_in
from adapters.format.files import CONFIG_FILE, WEIGHTS_FILE
from server.auth.keys import Caller
from server.errors import ServerError, StartError
from server.hosting.given import Given, NamedFolder, NamedUrl
from server.registry.registry import Registry
from server.registry.service import AdapterService
from server.sources.fetching import Allowed
from server.sources.loading import AdapterSources

logger = logging.getLogger(__name__)

AT_START = Caller("--adapter", True)


async def store_given_adapters(
    registry: Registry, service: AdapterService, given: Sequence[Given], sources: AdapterSources | None = None
) -> None:
    """Put every adapter into the store, unless its name has that content, and print which of the two happened.

    sources: what fetches those of URLs. Raises StartError with everything that is wrong.
    """
    problems: list[str] = []
    for named in given:
        try:
            async with _staged(service, named, sources) as (staged, source):
                said = await _store_one(registry, service, named.name, staged, source)
            print(f"--adapter {named.name}: {said}", flush=True)
        except (OSError, ServerError, InvalidAdapterError, StoreError) as error:
            place = named.folder if isinstance(named, NamedFolder) else named.place
            problems.append(f"--adapter {named.name}={place}: {error}")
    if problems:
        raise StartError("\n".join(problems))


@asynccontextmanager
async def _staged(
    service: AdapterService, named: Given, sources: AdapterSources | None
) -> AsyncIterator[tuple[Path, str]]:
    """The staged files, and where they are from, as it is recorded."""
    if isinstance(named, NamedUrl):
        assert sources is not None
        async with sources.fetched(Allowed(named.place, named.place)) as (folder, source):
            yield folder, source
        return
    staged = await to_thread(service.stage)
    try:
        await to_thread(_copy, named.folder, staged)
        yield staged, str(named.folder)
    finally:
        await to_thread(service.discard, staged)


async def _store_one(registry: Registry, service: AdapterService, name: str, staged: Path, source: str) -> str:
    """Returns what happened."""
    adapter, is_new = await service.upload(name, staged, True, AT_START, only_if_new=True, source=source)
    assert adapter.uploaded is not None
    number = adapter.uploaded
    if not is_new:
        return f"nothing changed: this content is version {number} already, {_state(registry, name, number)}"
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
