"""Owns the entry point of the console script `perft`, and the check that our other two packages are really ours.

The distribution installs `server` and `adapters` beside `perft`, and others use these names too. Before anything of
them is imported, both must be found in the folder that holds this package. Imports the standard library only.
"""

import base64
import os
import sys
from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "perft-server"
OURS = {"server": "cli.py", "adapters": "ref.py"}
"""Package -> a module that it has."""


class ForeignPackageError(RuntimeError):
    """A package with the name of one of ours is found in its place; the text is one sentence."""


def main() -> None:
    """Run `perft`. Exits with 1 if a foreign package is in the way."""
    try:
        check_packages()
    except ForeignPackageError as error:
        print(f"perft: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    from server.cli import main as run

    run()


def check_packages(names: Iterable[str] = tuple(OURS)) -> None:
    """Raises ForeignPackageError unless Python finds our packages under these names."""
    home = Path(__file__).resolve().parents[1]
    for name in names:
        expected, module = home / name, OURS[name]
        found = package_path(name)
        if found is None:
            raise ForeignPackageError(
                f"found no package {name}, expected ours at {expected}: install {DISTRIBUTION} again"
            )
        if found != expected:
            raise ForeignPackageError(f"found {name} at {found}, expected ours at {expected}: {remedy(found)}")
        if not all((expected / file).is_file() for file in ("__init__.py", module)):
            raise ForeignPackageError(f"found only a part of {name} at {expected}: install {DISTRIBUTION} again")
        if expected / "__init__.py" in overwritten_files(home):
            raise ForeignPackageError(
                f"found files of another package {name} in {expected}, expected only ours: "
                f"install {DISTRIBUTION} in an environment of its own"
            )


def package_path(name: str) -> Path | None:
    """Where Python finds `name`, without importing it: the package's folder or the module's file. None: nowhere."""
    try:
        spec = find_spec(name)
    except ValueError:  # imported already, by something that left no trace of where it lies
        spec = None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin else None


def remedy(found: Path) -> str:
    """What to do about a foreign package, by how it came into the way."""
    folder = found.parent
    listed = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder in (Path(entry).resolve() for entry in listed if entry):
        return f"take {folder} off PYTHONPATH"
    if folder == Path.cwd().resolve():
        return "start from another folder"
    return f"uninstall that package, or install {DISTRIBUTION} in an environment of its own"


def overwritten_files(home: Path) -> Iterator[Path]:
    """Each `__init__.py` of ours that is not the one pip installed: another distribution was installed over it.

    An editable install has no record of these files, and no other distribution writes into a checkout.
    """
    try:
        recorded = files(DISTRIBUTION) or []
    except PackageNotFoundError:
        return
    wanted = {f"{name}/__init__.py" for name in OURS}
    for file in recorded:
        path = Path(str(file.locate())).resolve()
        if str(file) in wanted and file.hash is not None and path.parent.parent == home and path.is_file():
            digest = base64.urlsafe_b64encode(sha256(path.read_bytes()).digest()).decode().rstrip("=")
            if file.hash.mode == "sha256" and file.hash.value != digest:
                yield path


if __name__ == "__main__":
    main()
