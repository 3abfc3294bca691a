"""An S3 server (moto's) in a process of its own, behind wires that can be cut: then bytes vanish, and nobody is told.

Where this process may make network namespaces, the server is in one, and each wire is a pair of virtual Ethernet ports;
elsewhere a wire is a proxy that stops passing bytes.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol

from tests.server.processes import free_port, wait_until

S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
}  # fmt: skip
NUMBER = os.getpid() % 10_000
"""In the names and addresses of this process's networks."""


class Wire(Protocol):
    """address: of the server, over this wire."""

    address: str

    def cut(self) -> AbstractContextManager[None]: ...


@dataclass
class S3Process:
    """The server; `stopped` it keeps its connections and answers nothing."""

    process: "subprocess.Popen[bytes]"
    wires: list[Wire]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextmanager
def s3_behind_wires(count: int = 1) -> Iterator[S3Process]:
    """With the bucket `adapters`."""
    import boto3

    with ExitStack() as stack:
        port = free_port()
        namespace = stack.enter_context(_namespace())
        inside = [] if namespace is None else ["ip", "netns", "exec", namespace]
        host = "127.0.0.1" if namespace is None else "0.0.0.0"
        program = "import sys; from moto.server import main; main(sys.argv[1:])"
        process = subprocess.Popen(
            [*inside, sys.executable, "-c", program, "-H", host, "-p", str(port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        wires: list[Wire] = []
        for number in range(count):
            if namespace is None:
                wires.append(stack.enter_context(_proxy(port)))
            else:
                wires.append(_Cable(namespace, number, port))
        wait_until(lambda: _answers(wires[0].address))
        client = boto3.client(
            "s3", endpoint_url=wires[0].address, aws_access_key_id="key", aws_secret_access_key="secret",
            region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket="adapters")
        yield S3Process(process, wires)


def _answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{address}/moto-api/", timeout=5):
        return True
    return False


@contextmanager
def _namespace() -> Iterator[str | None]:
    """The name of a new network namespace; None where there can be none."""
    name = f"perft{NUMBER}"
    made = shutil.which("ip") is not None and _run("ip", "netns", "add", name, check=False)
    try:
        yield name if made else None
    finally:
        if made:
            _run("ip", "netns", "del", name)


class _Cable:
    """Two virtual Ethernet ports, ours and the server's. Cut, the server's answers go nowhere."""

    def __init__(self, namespace: str, number: int, port: int) -> None:
        self._namespace = ("-n", namespace)
        ours, theirs = f"pf{NUMBER}o{number}", f"pf{NUMBER}t{number}"
        net = f"198.18.{NUMBER % 250}.{number * 4}"  # of the networks for tests of networks
        begin, last = net.rpartition(".")[::2]
        self._us, them = f"{begin}.{int(last) + 1}", f"{begin}.{int(last) + 2}"
        self.address = f"http://{them}:{port}"
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", namespace)
        _run("ip", "addr", "add", f"{self._us}/30", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        _run("ip", *self._namespace, "addr", "add", f"{them}/30", "dev", theirs)
        _run("ip", *self._namespace, "link", "set", theirs, "up")

    @contextmanager
    def cut(self) -> Iterator[None]:
        _run("ip", *self._namespace, "route", "add", "blackhole", f"{self._us}/32")
        try:
            yield
        finally:
            _run("ip", *self._namespace, "route", "del", "blackhole", f"{self._us}/32")


def _run(*command: str, check: bool = True) -> bool:
    return subprocess.run(command, capture_output=True, check=check).returncode == 0


class _Proxy:
    """Passes bytes both ways, until it is cut: then it takes connections and bytes, and keeps them to itself."""

    def __init__(self, listening: socket.socket, port: int) -> None:
        self.address = "http://{}:{}".format(*listening.getsockname())
        self._port, self._whole = port, threading.Event()
        self._whole.set()
        self._start(self._accept, listening)

    @contextmanager
    def cut(self) -> Iterator[None]:
        self._whole.clear()
        try:
            yield
        finally:
            self._whole.set()

    def _start(self, work: "threading._Callable", *arguments: socket.socket) -> None:  # type: ignore[name-defined]
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near = listening.accept()[0]
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:  # the server is starting
                near.close()
                continue
            self._start(self._pass, near, far)
            self._start(self._pass, far, near)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._whole.wait()
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@contextmanager
def _proxy(port: int) -> Iterator[_Proxy]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield _Proxy(listening, port)
        listening.shutdown(socket.SHUT_RDWR)
