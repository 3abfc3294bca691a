"""A page of another origin: a server of its own, with one page and the script of the attacks."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ATTACK = Path(__file__).with_name("attack.js")


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        is_script = self.path == "/attack.js"
        body = (
            ATTACK.read_bytes()
            if is_script
            else b"<!doctype html><title>elsewhere</title><script src=/attack.js></script>"
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/javascript" if is_script else "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def other_origin() -> Iterator[int]:
    """The port of a server on this machine whose pages attack."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
