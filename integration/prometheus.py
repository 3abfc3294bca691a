"""A real Prometheus on loopback, with the configuration of deploy/ except the target, its key and the intervals."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from integration.fetch import program
from tests.server.processes import LIMIT_S, free_port

DEPLOYED = Path(__file__).parents[1] / "deploy" / "prometheus"
SCRAPE_S = 5
"""From one scrape to the next, and the most that one may take: 5,000 adapters on a busy machine need more than 1 s."""
_Found = TypeVar("_Found")


def promtool(*arguments: str, folder: Path = DEPLOYED) -> None:
    """Run promtool. Raises AssertionError with its output if it fails."""
    done = subprocess.run(
        [str(program("promtool")), *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def write_configuration(folder: Path, addresses: Sequence[str], key: str) -> Path:
    """deploy/'s configuration, scraping the addresses (HOST:PORT) with `key` every SCRAPE_S."""
    configuration = yaml.safe_load((DEPLOYED / "prometheus.yml").read_text(encoding="utf-8"))
    (folder / "metrics_key").write_text(f"{key}\n")
    pace = f"{SCRAPE_S}s"
    configuration["global"] = {"scrape_interval": pace, "scrape_timeout": pace, "evaluation_interval": "1s"}
    configuration["rule_files"] = [str(DEPLOYED / name) for name in configuration["rule_files"]]
    (scrape,) = configuration["scrape_configs"]
    scrape["authorization"]["credentials_file"] = str(folder / "metrics_key")
    scrape["static_configs"] = [{"targets": list(addresses)}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    return file


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of a response of its HTTP API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=LIMIT_S) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def value(self, expression: str) -> float | None:
        """The value of a query with one sample."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if len(found) == 1 else None

    def wait_for(self, ask: Callable[[], _Found], is_there: Callable[[_Found], bool]) -> _Found:
        """The first result of `ask` for which `is_there`. Raises AssertionError with the last one."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            try:
                found: Any = ask()
                if is_there(found):
                    return found
            except OSError as error:
                found = error
            assert time.monotonic() < deadline, f"not after {LIMIT_S} s; last: {found}"
            time.sleep(0.3)


@contextmanager
def scraping(folder: Path, addresses: Sequence[str], key: str) -> Iterator[Prometheus]:
    """A Prometheus that scrapes the addresses, until the end of the block."""
    port = free_port()
    command = [
        str(program("prometheus")),
        f"--config.file={write_configuration(folder, addresses, key)}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(LIMIT_S)
