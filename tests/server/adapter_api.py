"""A small HTTP server on a real socket that answers from memory as docs/api.md says, for tests of its clients."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapters.identity import content_digest
from tests.server.processes import KEEP_ALIVE_S

KEY = "the-admin-key"
Api = TypeVar("Api", bound="AdapterApi")


@dataclass
class AdapterApi:
    """Adapters by name. polls_to_drain: how often a deleted version is still read. files: (name, version) -> bytes.

    notes: of every upload.
    """

    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[tuple[str, int], dict[str, bytes]] = field(default_factory=dict)
    uploads: list[dict[str, Any]] = field(default_factory=list)
    patches: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    polls_to_drain: int = 2
    url: str = ""

    def app(self) -> Starlette:
        one, version = "/v1/adapters/{name}", "/v1/adapters/{name}/versions/{version:int}"
        return Starlette(
            routes=[
                Route("/v1/adapters", self.upload, methods=["POST"]),
                Route("/v1/adapters", self.list, methods=["GET"]),
                Route(one, self.get, methods=["GET"]),
                Route(one, self.patch, methods=["PATCH"]),
                Route(one, self.delete, methods=["DELETE"]),
                Route(version, self.delete, methods=["DELETE"]),
                Route(version + "/files/{file}", self.file, methods=["GET"]),
            ]
        )

    def add(self, name: str, digest: str, active: bool = True, **changes: Any) -> int:
        """A further version of `name`, as an upload of that digest would make it."""
        adapter = self.adapters.setdefault(
            name,
            {"object": "adapter", "name": name, "active": None, "allowed_keys": None, "pinned": False, "versions": []},
        )
        number = 1 + max((version["version"] for version in adapter["versions"]), default=0)
        shape = {"variant": "R", "expert_type": "lora", "num_experts": 4, "top_k": 2, "bottleneck": 16}
        adapter["versions"].append(
            {
                "version": number, "id": f"{name}@{number}", "digest": digest, "state": "ready", "reason": None,
                "peft_type": "PERFT", "size_bytes": 1_500_000, "rows": 272, "created": 1_700_000_000,
                "resident": "device", "requests_running": 1, "last_used": 1_700_000_000, "description": None,
            } | shape | changes
        )  # fmt: skip
        adapter["active"] = number if active else adapter["active"]
        return number

    async def upload(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return refusal(401, "invalid_api_key", "found no valid key")
        async with request.form() as form:
            uploaded = {key: value for key, value in form.items() if isinstance(value, str)}
            sent = {key: (value.filename, await value.read()) for key, value in form.items() if _is_file(value)}
        self.uploads.append(uploaded | sent)
        if uploaded["name"] == "broken":
            return refusal(400, "invalid_adapter", "found 2 violations", violations=["r: found 0", "x: \x1b[2Jgone"])
        parts = {key: content for key, (_, content) in sent.items()}
        digest = content_digest(parts["config"], sha256(parts["weights"]).digest()) if "config" in parts else None
        digest = digest or sha256(parts.get("file", b"")).hexdigest()
        known = [v for v in self.adapters.get(uploaded["name"], {}).get("versions", []) if v["digest"] == digest]
        number = known[0]["version"] if known else self.add(uploaded["name"], digest, uploaded["activate"] == "true")
        self.files.setdefault((uploaded["name"], number), parts)
        notes = {"notes": self.notes} if self.notes else {}
        location = f"/v1/adapters/{uploaded['name']}/versions/{number}"
        answer = self.adapters[uploaded["name"]] | notes
        return JSONResponse(answer, 200 if known else 201, {"Location": location})

    async def list(self, request: Request) -> Response:
        after, limit = request.query_params.get("after", ""), min(int(request.query_params["limit"]), 2)
        found = [self.adapters[name] for name in sorted(self.adapters) if name > after]
        has_more = len(found) > limit
        last = found[limit - 1]["name"] if has_more else None
        return JSONResponse({"object": "list", "data": found[:limit], "has_more": has_more, "next": last})

    async def get(self, request: Request) -> Response:
        adapter = self.adapters.get(request.path_params["name"])
        if adapter is None:
            return refusal(404, "adapter_not_found", f"found no adapter {request.path_params['name']!r}")
        answer = JSONResponse(adapter)
        if any(version["state"] == "draining" for version in adapter["versions"]):
            self._drain(adapter)
        return answer

    async def patch(self, request: Request) -> Response:
        adapter, change = self.adapters[request.path_params["name"]], await request.json()
        self.patches.append(change)
        if change.get("if_active", adapter["active"]) != adapter["active"]:
            return refusal(409, "active_changed", f"found version {adapter['active']} active, not the one you named")
        adapter.update({key: value for key, value in change.items() if key != "if_active"})
        return JSONResponse(adapter)

    async def delete(self, request: Request) -> Response:
        adapter, number = self.adapters[request.path_params["name"]], request.path_params.get("version")
        if number == adapter["active"] and len(adapter["versions"]) > 1:
            return refusal(409, "version_active", f"found version {number} active")
        for version in adapter["versions"]:
            if number in (None, version["version"]):
                version["state"] = "draining"
        return JSONResponse(adapter, 202)

    async def file(self, request: Request) -> Response:
        path = request.path_params
        return Response(self.files[path["name"], path["version"]][path["file"]])

    def _drain(self, adapter: dict[str, Any]) -> None:
        self.polls_to_drain -= 1
        if self.polls_to_drain <= 0:
            adapter["versions"] = [v for v in adapter["versions"] if v["state"] != "draining"]
            if not adapter["versions"]:
                del self.adapters[adapter["name"]]


def refusal(status: int, code: str, message: str, **more: Any) -> Response:
    """OpenAI's error object."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code} | more
    return JSONResponse({"error": error}, status)


def _is_file(value: object) -> bool:
    return isinstance(value, UploadFile)


@contextmanager
def serving(api: Api, port: int = 0) -> Iterator[Api]:
    """`api` on a port of this machine (0: a free one), in a thread, for the duration."""
    server = uvicorn.Server(
        uvicorn.Config(api.app(), port=port, log_level="warning", lifespan="off", timeout_keep_alive=KEEP_ALIVE_S)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        api.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield api
    finally:
        server.should_exit = True
        thread.join()
