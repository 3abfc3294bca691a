"""Fetches what `make integration` needs besides Python: Debian's Prometheus and the openai JavaScript client.

    python integration/fetch.py

Prometheus is unpacked into .integration/ (no root, no service is started) unless one is installed; the client is
installed in integration/js/node_modules, exactly as its lock file says. A second call returns at once. Every failure is
one sentence and exit status 1.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".integration"
JS = HERE / "js"
PROMETHEUS = ("prometheus", "promtool")
OLDEST_PROMETHEUS = (2, 40)
OLDEST_NODE = (18,)


def main() -> None:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    fetch_prometheus()
    fetch_client()


def program(name: str) -> Path | None:
    """Where a program is: fetched, else installed."""
    fetched = CACHE / "prometheus" / "usr" / "bin" / name
    installed = shutil.which(name)
    return fetched if fetched.is_file() else Path(installed) if installed else None


def fetch_prometheus() -> None:
    if all(is_new_enough(program(name), OLDEST_PROMETHEUS) for name in PROMETHEUS):
        return
    if shutil.which("apt-get") is None:
        fail("found no prometheus and no apt-get: install Prometheus 2.40 or newer so that `promtool` is in the PATH")
    say("unpacking Debian's prometheus (19 MB)")
    if not unpack_debian("prometheus"):
        say("it cannot be downloaded alone: installing it")
        apt_get("install", "-y", "--no-install-recommends", "prometheus")
    if not all(is_new_enough(program(name), OLDEST_PROMETHEUS) for name in PROMETHEUS):
        fail("Debian's prometheus does not run here or is older than 2.40: install a newer one into the PATH")


def unpack_debian(package: str) -> bool:
    """Unpack a Debian package into the cache; whether that succeeded."""
    downloads = CACHE / "download"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    if not runs(["apt-get", "download", package], downloads):
        apt_get("update")
        if not runs(["apt-get", "download", package], downloads):
            return False
    unfinished = CACHE / f"{package}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    (archive,) = downloads.glob("*.deb")
    if not runs(["dpkg", "-x", str(archive), str(unfinished)], CACHE):
        return False
    shutil.rmtree(CACHE / package, ignore_errors=True)
    unfinished.rename(CACHE / package)
    shutil.rmtree(downloads)
    return True


def fetch_client() -> None:
    stamp, wanted = CACHE / "js-lock", hashlib.sha256((JS / "package-lock.json").read_bytes()).hexdigest()
    fetch_node()
    if stamp.is_file() and stamp.read_text() == wanted and (JS / "node_modules" / "openai").is_dir():
        return
    say("installing the openai JavaScript client")
    done = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=JS,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        fail(f"npm ci failed: {last_line(done.stderr)}")
    stamp.write_text(wanted)


def fetch_node() -> None:
    if is_new_enough(program("node"), OLDEST_NODE) and program("npm"):
        return
    if shutil.which("apt-get") is None:
        fail("found no Node.js of version 18 or newer with npm, and no apt-get: install both")
    say("installing Debian's Node.js and npm")
    apt_get("update")
    apt_get("install", "-y", "--no-install-recommends", "nodejs", "npm")
    if not (is_new_enough(program("node"), OLDEST_NODE) and program("npm")):
        fail("Debian's nodejs is older than 18 here: install a newer Node.js with npm")


def is_new_enough(path: Path | None, oldest: tuple[int, ...]) -> bool:
    """Whether the program runs and reports a version of at least `oldest`."""
    if path is None:
        return False
    try:
        done = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    found = re.search(r"(\d+)\.(\d+)", done.stdout + done.stderr)
    return found is not None and (int(found[1]), int(found[2])) >= oldest


def apt_get(*arguments: str) -> None:
    if os.geteuid() != 0:
        fail(f"`apt-get {' '.join(arguments)}` needs root: run it yourself with sudo, then `make integration` again")
    done = subprocess.run(
        ["apt-get", "-q", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    if done.returncode:
        fail(f"`apt-get {' '.join(arguments)}` failed: {last_line(done.stderr)}")


def runs(command: Sequence[str], folder: Path) -> bool:
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode == 0


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it gave no reason"


def say(text: str) -> None:
    print(f"integration: {text}", flush=True)


def fail(text: str) -> None:
    print(f"integration: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
