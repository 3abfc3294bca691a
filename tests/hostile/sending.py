"""Owns sending an attack over a socket: plain enough to break HTTP's rules, and never waiting without a limit."""

import socket
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from select import select

from tests.hostile.attack import Attack, Cut, Pause, Setting, Upload

PATH = "/v1/adapters"
LIMIT_S = 300.0


def send(
    attack: Attack,
    setting: Setting,
    host: str,
    port: int,
    headers: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> tuple[int, bytes]:
    """The status and body that the server answers with; status 0: the connection ended without an answer.

    Raises TimeoutError after `limit_s`.
    """
    return send_upload(attack.make(setting), host, port, headers, limit_s)


def send_upload(
    upload: Upload, host: str, port: int, headers: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
) -> tuple[int, bytes]:
    """Send any upload; stops sending where the server answers or hangs up."""
    deadline = time.monotonic() + limit_s
    with socket.create_connection((host, port), timeout=limit_s) as connection:
        connection.settimeout(limit_s)
        try:
            connection.sendall(_head(upload, f"{host}:{port}", headers or {}))
            for data in _body(upload, connection, deadline):
                connection.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        return _answer(connection)


def _head(upload: Upload, host: str, headers: Mapping[str, str]) -> bytes:
    lines = {"Host": host, **headers, **(upload.headers or {})}
    if upload.content_type is not None:
        lines["Content-Type"] = upload.content_type
    if upload.content_length is None:
        lines["Transfer-Encoding"] = "chunked"
    else:
        lines["Content-Length"] = str(upload.content_length)
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {PATH} HTTP/1.1\r\n{text}\r\n".encode()


def _body(upload: Upload, connection: socket.socket, deadline: float) -> Iterator[bytes]:
    """The bytes to send, until the server has something to say."""
    for piece in upload.pieces:
        if isinstance(piece, Cut):
            connection.shutdown(socket.SHUT_RDWR)
            return
        wait = piece.seconds if isinstance(piece, Pause) else 0
        left = max(0.0, deadline - time.monotonic())
        if select([connection], [], [], min(wait, left))[0]:
            return
        if wait >= left:
            raise TimeoutError("the server took bytes for longer than the limit")
        if isinstance(piece, bytes) and piece:
            yield piece if upload.content_length is not None else b"%x\r\n%b\r\n" % (len(piece), piece)
    if upload.content_length is None:
        yield b"0\r\n\r\n"


def _answer(connection: socket.socket) -> tuple[int, bytes]:
    response = HTTPResponse(connection, method="POST")
    try:
        response.begin()
        return response.status, response.read()
    except (HTTPException, ConnectionError):
        return 0, b""
    finally:
        response.close()
