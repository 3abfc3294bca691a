"""Real server processes on real sockets: start, wait until ready, stop by signal, read the log.

No test depends on how fast the machine is: what must come about is waited for, for minutes.
"""

import atexit
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

START_LIMIT_S = LIMIT_S = 500.0
"""Far more than anything takes; a test itself has 600 s."""
KEEP_ALIVE_S = 600
"""How long the tests' own servers keep an idle connection: no client of theirs uses one again after so long."""
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def free_port() -> int:
    """A port of this machine that is free, and that the system gives to no outgoing connection meanwhile."""
    first_of_system = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, max(first_of_system, 11_000))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port


_GIVEN = set[int]()
"""Ports that were given before, to servers that may not have bound theirs yet."""


def wait_until(is_so: Callable[[], bool], pause_s: float = 0.05) -> None:
    """Wait for what comes about by itself. Raises AssertionError if it does not."""
    deadline = time.monotonic() + LIMIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"it did not come about in {LIMIT_S} s"
        time.sleep(pause_s)


@dataclass
class ServerProcess:
    """A started server; `log` holds all that it printed. port: 0 until it said which free one it took."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, path: str) -> None:
        """Wait for 200 on `path`. Raises AssertionError, with the log's end, if the process ends first."""
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                if self.port or self._took_a_port():
                    with urllib.request.urlopen(self.url + path, timeout=5):
                        return
            except OSError:
                pass
            time.sleep(0.3)
        raise AssertionError(f"not ready after {START_LIMIT_S} s:\n{self.log.read_text()[-4000:]}")

    def _took_a_port(self) -> bool:
        if said := re.search(r"PERFT is serving at \w+://[^/ ]+:(\d+)/v1", self.log.read_text(errors="replace")):
            self.port = int(said[1])
        return bool(said)

    @contextmanager
    def engine_stopped(self) -> Iterator[None]:
        """Every process that the server started stands still meanwhile: no request comes to its end."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        assert started
        for process in started:
            process.suspend()
        try:
            yield
        finally:
            for process in started:
                process.resume()

    def stop(self, limit_s: float = LIMIT_S) -> int:
        """SIGTERM; the exit code. The process group is killed if it does not end within the limit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit_s)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def processes_of(server: ServerProcess) -> dict[int, str]:
    """Every process of the session that the server was started as, by id; those that have ended do not count."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            name, _, fields = (entry / "stat").read_text().rpartition(")")
        except OSError:  # no process, or gone
            continue
        state, _, _, session = fields.split()[:4]
        if int(session) == server.process.pid and state != "Z":
            found[int(entry.name)] = name
    return found


@contextmanager
def unfinished_upload(port: int, key: str, store: Path) -> Iterator[None]:
    """A POST /v1/adapters that the server at work on `store` has begun to receive, and whose rest never comes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        headers = f"Authorization: Bearer {key}\r\nContent-Type: multipart/form-data; boundary=b"
        lines = f"POST /v1/adapters HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n{headers}\r\n\r\n--b\r\n"
        connection.sendall(lines.encode())
        wait_until(lambda: any((store / "staging").iterdir()))
        yield


def launch(arguments: list[str], port: int, log: Path, **environment: str) -> ServerProcess:
    """Start `python ARGUMENTS` as its own process group, all output into `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip
    atexit.register(_end, process)
    return ServerProcess(process, port, log)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """A server whose test failed before it was stopped must not outlive the tests."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def run_to_end(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS` to its end; stdout and stderr together."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, timeout=START_LIMIT_S, env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip
