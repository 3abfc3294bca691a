"""Fetches what `make integration` needs besides Python: Debian's Prometheus and chromium, and JavaScript packages.

    python integration/fetch.py [prometheus|chromium|javascript ...]

Prometheus and chromium are unpacked into .integration/ (no root, no service is started) unless they are installed; the
JavaScript packages are installed in integration/js/node_modules, exactly as their lock file says. A second call returns
at once. Every failure is one sentence and exit status 1.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".integration"
JS = HERE / "js"
PROMETHEUS = ("prometheus", "promtool")
FETCHED = {"chromium": CACHE / "chromium" / "usr" / "lib" / "chromium" / "chromium"}
OLDEST_PROMETHEUS = (2, 40)
OLDEST_NODE = (18,)
PACKAGES = [JS / "node_modules" / name for name in ("openai", "axe-core")]
OLDEST_CHROMIUM = (120,)
FONTS = ("fonts-inter", "fonts-dejavu-core")
FONTS_CONFIGURATION = f"""<?xml version="1.0"?>
<fontconfig>
  <dir>{CACHE / "fonts"}</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>{CACHE / "font-cache"}</cachedir>
  <alias binding="strong"><family>system-ui</family><prefer><family>Inter</family></prefer></alias>
  <alias binding="strong"><family>sans-serif</family><prefer><family>Inter</family></prefer></alias>
  <alias binding="strong"><family>monospace</family><prefer><family>DejaVu Sans Mono</family></prefer></alias>
</fontconfig>
"""
"""The same text on every machine: system-ui is Inter there."""


def main() -> None:
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    fetches = {"prometheus": fetch_prometheus, "chromium": fetch_chromium, "javascript": fetch_packages}
    for name in sys.argv[1:] or fetches:
        if name not in fetches:
            fail(f"found {name}, expected some of {', '.join(fetches)}")
        fetches[name]()


def program(name: str) -> Path | None:
    """Where a program is: fetched, else installed."""
    fetched = FETCHED.get(name, CACHE / "prometheus" / "usr" / "bin" / name)
    installed = shutil.which(name)
    return fetched if fetched.is_file() else Path(installed) if installed else None


def libraries(name: str) -> dict[str, str]:
    """The environment in which a program runs: where its fetched libraries are."""
    if program(name) != FETCHED.get(name):
        return {}
    folders = sorted({str(file.parent) for file in (CACHE / name).glob("**/lib*.so*")})
    return {"LD_LIBRARY_PATH": os.pathsep.join([*folders, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])}


def fetch_prometheus() -> None:
    if all(is_new_enough(program(name), OLDEST_PROMETHEUS) for name in PROMETHEUS):
        return
    if shutil.which("apt-get") is None:
        fail("found no prometheus and no apt-get: install Prometheus 2.40 or newer so that `promtool` is in the PATH")
    say("unpacking Debian's prometheus (19 MB)")
    if not unpack_debian("prometheus", ["prometheus"]):
        say("it cannot be downloaded alone: installing it")
        apt_get("install", "-y", "--no-install-recommends", "prometheus")
    if not all(is_new_enough(program(name), OLDEST_PROMETHEUS) for name in PROMETHEUS):
        fail("Debian's prometheus does not run here or is older than 2.40: install a newer one into the PATH")


def fetch_chromium() -> None:
    if not is_new_enough(program("chromium"), OLDEST_CHROMIUM, libraries("chromium")):
        if shutil.which("apt-get") is None:
            fail("found no chromium and no apt-get: install Chromium so that `chromium` is in the PATH")
        say("unpacking Debian's chromium and what it needs (130 MB)")
        if not unpack_debian("chromium", missing("chromium")):
            say("it cannot be downloaded alone: installing it")
            apt_get("install", "-y", "--no-install-recommends", "chromium")
        if not is_new_enough(program("chromium"), OLDEST_CHROMIUM, libraries("chromium")):
            fail("Debian's chromium does not run here or is older than 120: install a newer one into the PATH")
    if not (CACHE / "fonts").is_dir() and shutil.which("apt-get"):
        say("unpacking fonts (4 MB)")
        unpack_debian("fonts", FONTS)
    (CACHE / "fonts.conf").write_text(FONTS_CONFIGURATION)


def missing(package: str) -> list[str]:
    """The package and all that it needs and this machine lacks."""
    command = ["apt-get", "--simulate", "install", "--no-install-recommends", package]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    return re.findall(r"^Inst (\S+)", done.stdout, re.MULTILINE) or [package]


def unpack_debian(name: str, packages: Sequence[str]) -> bool:
    """Unpack Debian packages into a folder of the cache; whether that succeeded."""
    downloads = CACHE / "download"
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()
    if not runs(["apt-get", "download", *packages], downloads):
        apt_get("update")
        if not runs(["apt-get", "download", *packages], downloads):
            return False
    unfinished = CACHE / f"{name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    if not all(runs(["dpkg", "-x", str(archive), str(unfinished)], CACHE) for archive in downloads.glob("*.deb")):
        return False
    shutil.rmtree(CACHE / name, ignore_errors=True)
    unfinished.rename(CACHE / name)
    shutil.rmtree(downloads)
    return True


def fetch_packages() -> None:
    stamp, wanted = CACHE / "js-lock", hashlib.sha256((JS / "package-lock.json").read_bytes()).hexdigest()
    fetch_node()
    if stamp.is_file() and stamp.read_text() == wanted and all(path.is_dir() for path in PACKAGES):
        return
    say("installing the openai JavaScript client and axe-core")
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


def is_new_enough(path: Path | None, oldest: tuple[int, ...], environment: Mapping[str, str] = {}) -> bool:
    """Whether the program runs and reports a version of at least `oldest`."""
    if path is None:
        return False
    try:
        done = subprocess.run(
            [str(path), "--version"], capture_output=True, text=True, check=False, env={**os.environ, **environment}
        )
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
