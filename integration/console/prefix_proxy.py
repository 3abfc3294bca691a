"""A small reverse proxy that serves the server below a prefix, which it takes off, as many in front of it do."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

METHODS = ["GET", "POST", "PATCH", "DELETE"]
HOP_BY_HOP = {"connection", "content-length", "host", "keep-alive", "transfer-encoding"}


def proxy_app(prefix: str, upstream: str) -> Starlette:
    client = httpx.AsyncClient(base_url=upstream, timeout=None)

    async def forward(request: Request) -> Response:
        headers = [(name, value) for name, value in request.headers.items() if name not in HOP_BY_HOP]
        url = httpx.URL(path=f"/{request.path_params.get('path', '')}", query=request.url.query.encode())
        asked = client.build_request(
            request.method, url, headers=[*headers, ("host", request.headers["host"])], content=await request.body()
        )
        answer = await client.send(asked, stream=True)
        kept = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}

        async def parts() -> AsyncIterator[bytes]:
            async for part in answer.aiter_raw():
                yield part

        return StreamingResponse(parts(), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    async def elsewhere(_: Request) -> Response:
        return PlainTextResponse("another application", 418)

    inside = [Route("/{path:path}", forward, methods=METHODS)]
    return Starlette(
        routes=[Route(prefix, forward), Mount(prefix, routes=inside), Route("/{path:path}", elsewhere, methods=METHODS)]
    )


@contextmanager
def proxied(prefix: str, upstream: str) -> Iterator[tuple[str, list[str]]]:
    """The URL of `upstream` below the prefix, and the paths outside of it that were asked for."""
    app, strays = proxy_app(prefix, upstream), list[str]()

    async def noted(scope: dict, receive: object, send: object) -> None:  # type: ignore[type-arg]
        if scope["type"] == "http" and not f"{scope['path']}/".startswith(f"{prefix}/"):
            strays.append(scope["path"])
        await app(scope, receive, send)  # type: ignore[arg-type]

    server = uvicorn.Server(uvicorn.Config(noted, port=0, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "it did not start"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}{prefix}", strays
    finally:
        server.should_exit = True
        thread.join()
