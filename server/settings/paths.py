"""Owns the check of the paths that a server was given, before anything is loaded.

Invariant: nothing is made or changed, so that a start that is refused leaves nothing behind.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from adapters.access import read_problem, write_problem
from adapters.errors import StoreError
from adapters.store.address import objects_at
from adapters.store.folder.lock import FolderLock
from adapters.store.log.cache import lock_of
from server.errors import StartError
from server.settings.model import Settings

MAX_ENTRIES = 10_000
"""How many entries of a folder are looked at."""
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
"""What a model's folder must hold in readable form, by suffix; a trainer's states beside it are not read."""


def check_paths(model: str, settings: Settings) -> None:
    """Raises StartError for a model, store, cache or audit log that this process cannot use, with each of them."""
    found = [model_problem(model), *places_problems(settings)]
    if problems := [problem for problem in found if problem]:
        raise StartError("\n".join(dict.fromkeys(problems)))


def model_problem(model: str) -> str | None:
    """Why a model's folder cannot be used; None if it can, or if `model` is not a path.

    vLLM would take a path where nothing is for the name of a repository, and skip a file that it cannot read.
    """
    is_path = model.startswith(("/", "./", "../", "~"))
    path = Path(model)
    if not is_path and not os.path.isdir(model):
        return None
    if problem := read_problem(path):
        return problem
    if not path.exists():
        return f"found nothing at {model}, expected the folder of a model"
    files = (file for file in _entries(path) if file.suffix in MODEL_FILES)
    return next(filter(None, (read_problem(file, f"chmod -R a+rX {path}") for file in files)), None)


def places_problems(settings: Settings) -> Iterator[str]:
    """Why the server could not write to its store, cache or audit log."""
    store = settings.adapter_store
    if isinstance(store, Path):
        problem = write_problem(store) or _store_problem(store)
    else:
        if problem := write_problem(settings.adapter_cache) or _cache_problem(settings.adapter_cache):
            yield f"--adapter-cache: {problem}"
        parts = urlsplit(store)
        problem = write_problem(Path(unquote(parts.path))) if parts.scheme == "file" else None
    if problem := problem or _opening_problem(store):
        yield f"--adapter-store: {problem}"
    elif problem := write_problem(settings.audit_path.parent):
        yield f"--audit-log: {problem}"


def _store_problem(store: Path) -> str | None:
    """What in a store belongs to somebody else, as after a start as another user."""
    mend = f"chown -R {os.geteuid()} {store}"
    problems = (
        write_problem(path) if path.is_dir() else read_problem(path, mend)
        for folder in (store, store / "names")
        for path in _entries(folder)
    )
    return next(filter(None, problems), None)


def _opening_problem(place: Path | str) -> str | None:
    """Why a store cannot be opened; None if it can, as far as that is known without changing it."""
    try:
        if isinstance(place, str):
            next(iter(objects_at(place).list("STORE.json")), None)
        elif (place / "lock").exists():
            FolderLock(place / "lock").release()
    except (StoreError, OSError) as error:
        return str(error)
    return None


def _cache_problem(cache: Path) -> str | None:
    """Which other server a cache belongs to."""
    try:
        if (cache / "lock").exists():
            lock_of(cache).release()
    except (StoreError, OSError) as error:
        return str(error)
    return None


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, if it is one."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry, _ in zip(entries, range(MAX_ENTRIES), strict=False)]
