"""Real server processes on real sockets: start, wait until ready, stop by signal, read what they said."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

START_LIMIT_S = 300
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class ServerProcess:
    """A server that was started; `log` holds all it printed."""

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
                with urllib.request.urlopen(self.url + path, timeout=5):
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"not ready after {START_LIMIT_S} s:\n{self.log.read_text()[-4000:]}")

    def stop(self, limit_s: float = 60) -> int:
        """SIGTERM; the exit code. The process group is killed if it does not end within the limit."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(limit_s)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


def launch(arguments: list[str], port: int, log: Path, **environment: str) -> ServerProcess:
    """Start `python ARGUMENTS` as its own process group, all output into `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **ENVIRONMENT, **environment},
        )  # fmt: skip
    return ServerProcess(process, port, log)


def run_to_end(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -c CODE ARGUMENTS` to its end; stdout and stderr together."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=False, timeout=START_LIMIT_S, env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip
