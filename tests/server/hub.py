"""A server on this machine that speaks as much of the Hugging Face Hub's wire as the hub's client needs."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote

FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Hub:
    """repositories: by id; revisions of one: branch, tag or commit -> commit; contents by commit.

    moved: an id -> the one that the hub answers for instead. claims: (commit, file) -> the size that it says.
    gate: while it is clear, nothing is answered. asked: (method, path) of every request.
    """

    revisions: dict[str, dict[str, str]] = field(default_factory=dict)
    contents: dict[str, dict[str, bytes]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    claims: dict[tuple[str, str], int] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)
    arrived: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def add(self, repository: str, folder: Path, *revisions: str) -> str:
        """A commit of the folder's files, at which `revisions` (main) point now."""
        commit = f"{len(self.contents) + 1:040x}"
        self.contents[commit] = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        known = self.revisions.setdefault(repository, {})
        known.update(dict.fromkeys((*(revisions or ("main",)), commit), commit))
        return commit

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            repository = "/".join(parts[2:4])
            repository = self.moved.get(repository, repository)
            if repository not in self.revisions:
                return 404, b"", {"X-Error-Code": "RepoNotFound"}
            commit = self.revisions[repository].get(parts[5] if len(parts) > 5 else "main")
            if commit is None:
                return 404, b"", {"X-Error-Code": "RevisionNotFound"}
            if parts[4:5] == ["paths-info"]:
                return 200, self._sizes(commit, parse_qs(body.decode())["paths"]), {"Content-Type": "application/json"}
            shown = {"id": repository, "sha": commit, "siblings": [], "private": False}
            return 200, json.dumps(shown).encode(), {"Content-Type": "application/json"}
        if parts[2:3] == ["resolve"] and parts[4] in self.contents.get(parts[3], {}):
            content = self.contents[parts[3]][parts[4]]
            headers = {"ETag": f'"{len(content)}-{parts[3]}"', "X-Repo-Commit": parts[3]}
            return 200, content, headers | {"Content-Type": "application/octet-stream"}
        return 404, b"", {"X-Error-Code": "EntryNotFound"}

    def _sizes(self, commit: str, paths: list[str]) -> bytes:
        there = self.contents[commit]
        sizes = {path: self.claims.get((commit, path), len(there[path])) for path in paths if path in there}
        return json.dumps([{"type": "file", "path": p, "size": s, "oid": "0" * 40} for p, s in sizes.items()]).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ClassVar[Hub]

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append((self.command, self.path))
        self.hub.arrived.set()
        self.hub.gate.wait()
        status, content, headers = self.hub.answer(self.command, self.path, body)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_POST = do_HEAD = respond

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub for the duration; set HF_ENDPOINT to its url."""
    hub = Hub()
    hub.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
