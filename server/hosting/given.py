"""Owns the adapters that a server is given at start (`--adapter NAME=PATH`, or a URL), and their early check.

Invariant: any failure refuses the start, with every reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.access import explained
from adapters.errors import InvalidAdapterError
from adapters.format.files import Limits
from adapters.format.folder import check_handed_in
from perft.base_model import BaseShape
from server.errors import StartError
from server.registry.registry import name_problem
from server.sources.place import Place, parse_place
from server.uploads.validate import peft_type


@dataclass(frozen=True)
class NamedFolder:
    """`--adapter NAME=PATH`."""

    name: str
    folder: Path


@dataclass(frozen=True)
class NamedUrl:
    """`--adapter NAME=URL`: on the hub or in a bucket. The operator may name any."""

    name: str
    place: Place


Given = NamedFolder | NamedUrl


def parse_named_folders(given: Sequence[str], base_names: list[str]) -> list[Given]:
    """The `--adapter` flags. Raises StartError with everything wrong about them."""
    folders: list[Given] = []
    problems: list[str] = []
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not path:
            problems.append(f"--adapter {item}: expected NAME=PATH")
        elif problem := name_problem(name, base_names):
            problems.append(f"--adapter {item}: {problem}")
        elif name in (named.name for named in folders):
            problems.append(f"--adapter {item}: the name {name!r} is given twice")
        elif "://" not in path:
            folders.append(NamedFolder(name, Path(path).absolute()))
        else:
            try:
                folders.append(_at_url(name, parse_place(path)))
            except ValueError as error:
                problems.append(f"--adapter {item}: {error}")
    if problems:
        raise StartError("\n".join(problems))
    return folders


def _at_url(name: str, place: Place) -> Given:
    return NamedFolder(name, Path(str(place))) if place.scheme == "file" else NamedUrl(name, place)


def check_folders(given: Sequence[Given], base: BaseShape | None, limits: Limits) -> None:
    """Check every PERFT folder as far as `base` is known. Raises StartError with every violation of every adapter.

    PEFT LoRA adapters are checked once the engine's own settings are known, and what a URL names once it is fetched.
    """
    problems: list[str] = []
    for named in (each for each in given if isinstance(each, NamedFolder)):
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
