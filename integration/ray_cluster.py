"""Two tiny replicas under Ray Serve with its HAProxy in front, as `perft ray up` starts them."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.server.processes import ServerProcess, free_port, launch, wait_until
from tests.server.tiny_server import BASE_NAME, KEYS

REPLICA = "ServeReplica:perft:PerftServer"
LAG_S = 1.0


def config(model: Path, folder: Path, port: int, *flags: str, **args: Any) -> dict[str, Any]:
    """A Serve config file's contents. The replicas take no CPUs of Ray's count: the machine has few."""
    given: dict[str, Any] = {
        "model": str(model),
        "name": BASE_NAME,
        "device": "cpu",
        "replicas": 2,
        "stats_period_s": 1.0,
        "deployment": {"ray_actor_options": {"num_cpus": 0}},
        "flags": [
            f"--adapter-store=file://{folder / 'store'}", f"--adapter-cache={folder / 'cache'}",
            f"--store-lag-s={LAG_S}", "--drain-timeout-s=30", "--dtype=float32", "--max-model-len=384",
            "--max-num-seqs=64", "--gpu-memory-utilization=0.2", "--block-size=32", "--pool-rows=8192",
            "--metrics-bind=127.0.0.1:0", *flags,
        ],
    }  # fmt: skip
    application = {"name": "perft", "route_prefix": "/", "import_path": "server.ray_serve.application:build"}
    return {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [application | {"args": given | args}],
    }


def environment() -> dict[str, str]:
    """For `perft ray up`: keys, and folders and ports that no other Ray of the machine has.

    The folder's path is short enough for the sockets in it.
    """
    short = tempfile.mkdtemp(prefix="ray-")
    atexit.register(shutil.rmtree, short, ignore_errors=True)
    haproxy = {
        "METRICS_PORT": str(free_port()), "STATS_PORT": str(free_port()), "CONFIG_FILE_LOC": f"{short}/haproxy.cfg",
        "SOCKET_PATH": f"{short}/admin.sock", "SERVER_STATE_BASE": short, "SERVER_STATE_FILE": f"{short}/state",
    }  # fmt: skip
    variables = {f"RAY_SERVE_HAPROXY_{name}": value for name, value in haproxy.items()}
    return {"PERFT_ADMIN_KEY": KEYS["admin"], "RAY_TMPDIR": short, **variables}


def arguments(path: Path) -> list[str]:
    return ["-m", "server.cli", "ray", "up", str(path)]


def refusal(folder: Path, values: dict[str, Any], lacks: str = "") -> str:
    """What `perft ray up` prints where it does not start; asserts that its exit status says so.

    lacks: a variable that its environment does not have.
    """
    path = folder / "refused.yaml"
    path.write_text(yaml.safe_dump(values))
    variables = {name: value for name, value in {**os.environ, **environment()}.items() if name != lacks}
    done = subprocess.run(
        [sys.executable, *arguments(path)], env=variables, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    return done.stdout


@dataclass
class Cluster:
    """A running cluster. front: the URL of HAProxy."""

    server: ServerProcess
    front: str

    def processes(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        started = psutil.Process(self.server.process.pid).children(recursive=True)
        return [process for process in started if any(REPLICA in word for word in _words(process))]

    def replicas(self) -> dict[str, psutil.Process]:
        """The URL of each replica's own port -> its process."""
        found: dict[str, psutil.Process] = {}
        for process in self.processes():
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and 30_000 <= connection.laddr.port <= 31_000:
                    found[f"http://127.0.0.1:{connection.laddr.port}"] = process
        return found

    def wait_for(self, count: int) -> None:
        """Until so many replicas run."""
        wait_until(lambda: f"{count} running" in self.said()[-1] or "PERFT is serving" in "".join(self.said()[-4:]))

    def said(self) -> list[str]:
        """What `perft ray up` printed, by line."""
        return self.server.log.read_text().strip().splitlines()


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def started(model: Path, folder: Path) -> Iterator[Cluster]:
    """The cluster, from its start to its end; asserts that it ends by itself when it is asked to."""
    port, path = free_port(), folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config(model, folder, port)))
    server = launch(arguments(path), port, folder / "cluster.log", **environment())
    try:
        server.wait_until("/ready")
        cluster = Cluster(server, f"http://127.0.0.1:{port}")
        wait_until(lambda: "PERFT is serving at" in server.log.read_text())
        yield cluster
    finally:
        status = server.stop()
    assert status == 0, server.log.read_text()[-4000:]
