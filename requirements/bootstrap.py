"""Makes the virtual environment from the lock files, with the standard library only: `make serve`, `make test`.

    python3.11 requirements/bootstrap.py .venv cpu test

Says what it does and how long that takes; every failure is one sentence and exit code 1. A second call with
unchanged files returns at once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
SIZES = {"cpu": "1 GB to download, 2 to 4 minutes", "test": "small, half a minute"}
NEEDED_BYTES = 5 * 10**9
OFFLINE = ("Failed to establish", "NameResolution", "Max retries", "Connection", "timed out", "No matching distr")
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(folder: Path, locks: list[str]) -> None:
    stamp = folder / "perft-locks.json"
    wanted = digests(locks)
    known = json.loads(stamp.read_text()) if stamp.is_file() else {}
    if wanted.items() <= known.items():
        return
    check_python()
    check_disk(folder)
    if not (folder / "bin" / "python").exists():
        say(f"making a virtual environment in {folder.name}")
        make_environment(folder)
    pip = [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--retries",
        "2",
    ]
    pending = [lock for lock in locks if known.get(f"{lock}.txt") != wanted[f"{lock}.txt"]]
    if "cpu" in pending:
        say("installing PyTorch for the CPU (0.2 GB)")
        install_torch(pip)
    for lock in pending:
        say(f"installing requirements/{lock}.txt ({SIZES[lock]})")
        run([*pip, "--no-deps", "-r", str(HERE / f"{lock}.txt")], f"requirements/{lock}.txt could not be installed")
    run([*pip, "--no-deps", "--no-build-isolation", "-e", str(PROJECT)], "this project could not be installed")
    stamp.write_text(json.dumps({**known, **wanted}))
    say("the virtual environment is ready")


def digests(locks: list[str]) -> dict[str, str]:
    """What the environment is made from, by file: a change makes it anew."""
    files = [*(HERE / f"{lock}.txt" for lock in locks), PROJECT / "pyproject.toml"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def make_environment(folder: Path) -> None:
    try:
        venv.create(folder, with_pip=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        fail(f"a virtual environment cannot be made here ({error}): on Debian install python3.11-venv")


def check_python() -> None:
    found = sys.version_info[:2]
    if found != (3, 11) or sys.implementation.name != "cpython":
        fail(f"found Python {found[0]}.{found[1]}, expected 3.11: install it, then `make PYTHON=python3.11 ...`")


def check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if free < NEEDED_BYTES:
        fail(f"found {free / 1e9:.1f} GB free in {folder.parent}, expected {NEEDED_BYTES / 1e9:.0f} GB: make room")


def install_torch(pip: list[str]) -> None:
    """The CPU build: from wherever pip is set up to look, else from PyTorch's own index."""
    pin = next(line for line in (HERE / "cpu.txt").read_text().splitlines() if line.startswith("torch=="))
    plain = subprocess.run([*pip, "--no-deps", pin], capture_output=True, text=True, check=False)
    if plain.returncode:
        run([*pip, "--no-deps", "--index-url", TORCH_CPU_INDEX, pin], f"{pin} could not be installed")


def run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any(word in done.stderr for word in ("No space left", "Errno 28")):
        fail(f"{what}: the disk is full; make room and run it again")
    offline = (
        "Failed to establish",
        "NameResolution",
        "Max retries",
        "Connection",
        "timed out",
        "No matching distribution",
    )
    if any(word in done.stderr for word in offline):
        last = lines[-1] if lines else ""
        fail(f"{what}: the package index cannot be reached; check the network and run it again ({last})")
    fail(f"{what}: {lines[-1] if lines else 'pip gave no reason'}")


def say(text: str) -> None:
    print(f"perft: {text}", flush=True)


def fail(text: str) -> None:
    print(f"perft: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2:])
