"""Makes the virtual environment from the lock files, with the standard library only: `make serve`, `make test`.

    python3.11 requirements/bootstrap.py .venv cpu test

Everything the machine must have is checked before anything is downloaded. Each step is announced with its size and
duration; every failure is one sentence and exit code 1. A second call with unchanged files returns at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
STAMP = "perft-locks.json"
SUPPORTED_PYTHONS = ((3, 11), (3, 12), (3, 13))
TESTED_PYTHON = (3, 11)
SIZES = {
    "cpu": "1 GB to download, 2 to 4 minutes",
    "test": "small, half a minute",
    "ray": "0.2 GB to download, a minute",
    "eval": "0.2 GB to download, a minute",
    "integration": "0.1 GB to download, half a minute",
}
ENVIRONMENT_BYTES = 6 * 10**9
"""The environment (2.6 GB), what pip keeps of the downloads, and the demo base (1.5 GB)."""
TEMPORARY_BYTES = 2 * 10**9
"""What pip unpacks while it installs."""
SYSFS = Path("/sys/devices/system/cpu")
OFFLINE = ("Failed to establish", "NameResolution", "Max retries", "Connection", "timed out", "No matching distr")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Need(NamedTuple):
    """Something outside Python that this machine must have."""

    name: str
    debian: str
    elsewhere: str
    is_there: Callable[[], bool]


def main(folder: Path, locks: list[str]) -> None:
    wanted, known = digests(locks), installed(folder)
    if wanted.items() <= known.items():
        return
    pending = [lock for lock in locks if known.get(f"{lock}.txt") != wanted[f"{lock}.txt"]]
    check_machine(folder, pending)
    if not (folder / "bin" / "python").exists():
        say(f"making a virtual environment in {folder.name}")
        make_environment(folder)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    pip += ["install", "--quiet", "--retries", "2"]
    if "cpu" in pending:
        say("installing PyTorch for the CPU (0.2 GB)")
        install_torch(pip)
    for lock in pending:
        say(f"installing requirements/{lock}.txt ({SIZES[lock]})")
        run([*pip, "--no-deps", "-r", str(HERE / f"{lock}.txt")], f"requirements/{lock}.txt could not be installed")
    run([*pip, "--no-deps", "--no-build-isolation", "-e", str(PROJECT)], "this project could not be installed")
    (folder / STAMP).write_text(json.dumps({**known, **wanted}))
    say("the virtual environment is ready")


def digests(locks: list[str]) -> dict[str, str]:
    """What the environment is made from, file name -> sha256. When one changes, its part is installed again."""
    files = [*(HERE / f"{lock}.txt" for lock in locks), PROJECT / "pyproject.toml"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def installed(folder: Path) -> dict[str, str]:
    """The digests that `folder` was made from: none if its Python is gone, as after an upgrade of the system's."""
    stamp = folder / STAMP
    if not stamp.is_file() or not (folder / "bin" / "python").exists():
        return {}
    found: dict[str, str] = json.loads(stamp.read_text())
    return found


def make_environment(folder: Path) -> None:
    if (folder / STAMP).is_file():  # ours, with a Python that is gone
        shutil.rmtree(folder)
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"a virtual environment cannot be made here ({error}): on Debian install {venv_package()}")


def check_machine(folder: Path, pending: list[str]) -> None:
    """Everything that must be there before the download of `pending` starts. Exits with the first thing that is not."""
    check_python()
    if "cpu" in pending:
        check_platform()
        check_needs(needs())
        check_disk(folder.parent, ENVIRONMENT_BYTES, "make room")
        check_disk(Path(tempfile.gettempdir()), TEMPORARY_BYTES, "make room or point TMPDIR elsewhere")


def check_python() -> None:
    found = sys.version_info[:2]
    if found not in SUPPORTED_PYTHONS or sys.implementation.name != "cpython":
        fail(
            f"found {platform.python_implementation()} {dotted(found)}, expected CPython 3.11, 3.12 or 3.13: "
            "install one, then `make PYTHON=python3.11 ...`"
        )
    if found != TESTED_PYTHON:
        say(f"using Python {dotted(found)}; the tested one is {dotted(TESTED_PYTHON)} (`make PYTHON=python3.11 ...`)")


def check_platform() -> None:
    """vLLM's CPU kernels are built for one platform only."""
    found = f"{platform.system()} on {platform.machine()}"
    if found != "Linux on x86_64":
        fail(f"found {found}, expected Linux on x86_64: the CPU server runs nowhere else")


def needs() -> list[Need]:
    """What vLLM on the CPU, and venv, take from the system."""
    return [
        Need("libnuma.so.1", "libnuma1", "numactl-libs", lambda: is_loadable("libnuma.so.1")),
        Need("lscpu", "util-linux", "util-linux", lambda: shutil.which("lscpu") is not None),
        Need("Python module ensurepip", venv_package(), "python3", lambda: is_importable("ensurepip")),
    ]


def check_needs(needed: list[Need]) -> None:
    missing = [need for need in needed if not need.is_there()]
    if missing:
        debian, elsewhere = (" ".join(packages) for packages in zip(*(need[1:3] for need in missing), strict=True))
        fail(
            f"found no {', '.join(need.name for need in missing)}, expected on every machine that runs the CPU server: "
            f"`apt-get install {debian}` (Fedora and its relatives: `dnf install {elsewhere}`), then run it again"
        )
    if not SYSFS.is_dir():
        fail(f"found no {SYSFS}, where the CPU server counts the cores: `mount -t sysfs sysfs /sys`")


def check_disk(folder: Path, needed: int, remedy: str) -> None:
    """Exits if the disk that holds `folder`, or will hold it, has less than `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        fail(f"found {free / 1e9:.1f} GB free in {folder}, expected {needed / 1e9:.0f} GB: {remedy}")


def is_loadable(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def is_importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def venv_package() -> str:
    """The Debian package that completes `venv` for this Python."""
    return f"python{dotted(sys.version_info[:2])}-venv"


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def install_torch(pip: list[str]) -> None:
    """The CPU build: from wherever pip is set up to look, else from PyTorch's own index."""
    pin = next(line for line in (HERE / "cpu.txt").read_text().splitlines() if line.startswith("torch=="))
    plain = subprocess.run([*pip, "--no-deps", pin], capture_output=True, text=True, check=False)
    if plain.returncode:
        run([*pip, "--no-deps", "--index-url", TORCH_CPU_INDEX, pin], f"{pin} could not be installed")


def run(command: list[str], what: str) -> None:
    """Run a command quietly. If it fails, exits with `what` and the reason that its output gives."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "pip gave no reason"
    offline = [line for line in lines if any(word in line for word in OFFLINE)]
    if any(word in done.stderr for word in ("No space left", "Errno 28")):
        fail(f"{what}: the disk is full; make room and run it again")
    if offline:
        fail(f"{what}: the package index cannot be reached; check the network and run it again ({offline[-1].strip()})")
    fail(f"{what}: {last}")


def say(text: str) -> None:
    print(f"perft: {text}", flush=True)


def fail(text: str) -> None:
    print(f"perft: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
