"""Owns bringing the adapters given at start into service. Any failure refuses the start, with every reason."""

from dataclasses import dataclass
from pathlib import Path

from adapters import CheckedAdapter, InvalidAdapterError, Limits, check_folder, read_folder
from perft.base import BaseShape
from server.engine import Engine, EngineStatus
from server.errors import StartError
from server.registry import Registry, ServedVersion, name_problem


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
    """Check every folder as far as `base` is known. Raises StartError with every violation of every adapter."""
    problems: list[str] = []
    for named in folders:
        _, violations = check_folder(named.folder, base, limits)
        if violations:
            problems.append(f"--adapter {named.name}: {InvalidAdapterError(str(named.folder), violations)}")
    if problems:
        raise StartError("\n".join(problems))


async def serve_at_start(engine: Engine, folders: list[NamedFolder], registry: Registry, limits: Limits) -> None:
    """Load every adapter into the engine, then into the registry.

    Raises StartError if the engine does not carry the operator, an adapter breaks the format, or the rows do not fit.
    """
    status = await engine.status()
    if status.moe_layers == 0 or status.base is None:
        raise StartError(f"the engine carries PERFT's operator on no MoE layer: {status.problem}")
    check_folders(folders, status.base, limits)
    checked = [read_folder(named.folder, status.base, limits) for named in folders]
    _check_rows(checked, status)
    for number, (named, adapter) in enumerate(zip(folders, checked, strict=True), start=1):
        version = ServedVersion(named.name, 1, number, adapter)
        await engine.load(version)
        registry.add(version)


def _check_rows(adapters: list[CheckedAdapter], status: EngineStatus) -> None:
    """Raises StartError unless all adapters fit the pool at once; equal contents are held once."""
    assert status.base is not None
    moe_layers = status.base.moe_layers
    by_digest = {
        adapter.digest: adapter.config.rows_per_layer() * len(adapter.config.layer_indices(moe_layers))
        for adapter in adapters
    }
    needed, free = sum(by_digest.values()), status.rows_total - status.rows_used
    if needed > free:
        raise StartError(
            f"too_many_rows: the adapters take {needed} rows, the pool has {free} free of {status.rows_total}: "
            "give fewer adapters, or a larger --pool-rows"
        )
