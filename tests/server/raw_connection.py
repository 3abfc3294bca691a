"""One raw connection to a server: bytes out, bytes back, and how it ended."""

import json
import socket
from typing import Any

from tests.server.processes import LIMIT_S


class RawConnection:
    """Close it, or use it in a `with`. receive_bytes: of the kernel's buffer, for a client that reads little."""

    def __init__(self, port: int, receive_bytes: int | None = None, host: str = "127.0.0.1") -> None:
        self.socket = socket.socket()
        if receive_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(LIMIT_S)
        self.socket.connect((host, port))

    def __enter__(self) -> "RawConnection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> bool:
        """Send all of it; False if the server has closed the connection."""
        try:
            self.socket.sendall(data)
        except OSError:
            return False
        return True

    def read_until(self, end: bytes) -> bytes:
        """All up to `end`, or to the end of the connection."""
        found = b""
        while end not in found:
            try:
                data = self.socket.recv(65536)
            except ConnectionError:
                break
            if not data:
                break
            found += data
        return found

    def read_to_end(self) -> bytes:
        """All that comes until the server closes. Raises TimeoutError if it does not."""
        return self.read_until(b"\0 is in no response")


def status_of(response: bytes) -> int:
    """0 for no response."""
    head = response.split(b" ", 2)
    return int(head[1]) if response.startswith(b"HTTP/1.1 ") else 0


def code_of(response: bytes) -> str:
    """The error's code in a response."""
    found: dict[str, Any] = json.loads(response.partition(b"\r\n\r\n")[2])
    code: str = found["error"]["code"]
    return code


def request(method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
    """A request as bytes. Headers: underscores are hyphens."""
    given = {"Host": "localhost"} | {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        given.setdefault("Content-Length", str(len(body)))
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + (body or b"")
