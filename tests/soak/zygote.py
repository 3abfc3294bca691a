"""Servers with the fake engine that start in a moment: one process imports everything once and forks each of them.

Every server is a fresh process of its own process group; nothing but imported modules comes from the parent, which has
a single thread and opens nothing.
"""

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.server.processes import LIMIT_S, free_port

PR_SET_PDEATHSIG = 1
"""Linux: a server ends with the parent, should that be killed."""


@dataclass
class ForkedServer:
    """One server. `log` holds all it printed; exit_code: None while it may run."""

    zygote: "Zygote"
    pid: int
    port: int
    log: Path
    exit_code: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + LIMIT_S
        with httpx.Client(verify=False, trust_env=False) as client:
            while time.monotonic() < deadline:
                assert self.is_alive(), self.log.read_text()[-4000:]
                try:
                    client.get(self.url + "/health", timeout=5).raise_for_status()
                    return
                except httpx.TransportError:
                    time.sleep(0.02)
        raise AssertionError(f"not ready after {LIMIT_S} s:\n{self.log.read_text()[-4000:]}")

    def is_alive(self) -> bool:
        """Whether it runs; takes the exit code once it does not."""
        if self.exit_code is None:
            self.exit_code = self.zygote.ask({"poll": self.pid})
        return self.exit_code is None

    def kill(self) -> None:
        """SIGKILL to the whole group, and wait until it is dead."""
        self.end(signal.SIGKILL)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code (minus the signal that ended it)."""
        if self.exit_code is None:
            os.killpg(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        """Wait until it ends by itself; the exit code."""
        deadline = time.monotonic() + LIMIT_S
        while self.is_alive():
            assert time.monotonic() < deadline, f"it goes on:\n{self.log.read_text()[-4000:]}"
            time.sleep(0.02)
        assert self.exit_code is not None
        return self.exit_code


@dataclass
class Zygote:
    """The parent of the servers. logs: the folder for what they print."""

    logs: Path
    servers: list[ForkedServer] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def start(self, store: Path, *flags: str, faults: Path | None = None) -> ForkedServer:
        """Fork a server on that store, with flags of `perft serve` that are ours; it may not be ready yet.

        faults: a file; while it exists, every change of the store's disk fails with the error number it holds.
        """
        port, log = free_port(), self.logs / f"server-{len(self.servers)}.log"
        arguments = ["--store", str(store), "--port", str(port), *flags]
        order = {"arguments": arguments, "log": str(log), "faults": None if faults is None else str(faults)}
        self.servers.append(ForkedServer(self, self.ask(order), port, log))
        return self.servers[-1]

    def ask(self, order: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the servers that still run, and the parent."""
        for server in self.servers:
            if server.is_alive():
                server.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def zygote(logs: Path) -> Iterator[Zygote]:
    made = Zygote(logs)
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    """Do what is ordered, a JSON object a line, until nobody orders any more."""
    from tests.server import fake_server

    children = set[int]()
    for line in sys.stdin.buffer:
        order = json.loads(line)
        answer: int | None
        if "arguments" in order:
            answer = os.fork()
            if answer == 0:
                _serve(fake_server.main, order)
            children.add(answer)
        else:
            found, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if found else None
            children -= {found}
        print(json.dumps(answer), flush=True)
    for child in children:
        os.killpg(child, signal.SIGKILL)


def _serve(run: Any, order: dict[str, Any]) -> None:
    """Be the server, in a forked child."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        output = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(output)
        os.close(nothing)
        if order["faults"] is not None:
            _break_disk(Path(order["faults"]))
        sys.argv = ["fake_server", *order["arguments"]]
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _break_disk(faults: Path) -> None:
    """Where no small disk can be mounted: the store's own writes fail while `faults` says so."""
    from adapters.store.folder import opening
    from adapters.store.folder.durable import Disk

    def fail(path: Path, hit: Callable[[int], bool]) -> None:
        number = int(faults.read_text()) if faults.exists() else 0
        if number and hit(number):
            raise OSError(number, os.strerror(number), str(path))

    def step(self: Disk, operation: str, path: Path) -> None:
        fail(path, lambda number: number == errno.EROFS or not operation.startswith("remove"))

    class Lock(opening.FolderLock):
        def __init__(self, path: Path) -> None:
            fail(path, lambda number: number == errno.EROFS)
            super().__init__(path)

    Disk.step = step  # type: ignore[method-assign]
    opening.FolderLock = Lock  # type: ignore[misc]


if __name__ == "__main__":
    main()
