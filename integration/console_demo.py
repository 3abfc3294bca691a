"""The server's app with its console on the fake engine, with something to see on every part of the page.

    python -m integration.console_demo [--port 8080] [--names 5000] [--keys] [--quiet] [--friendly]
        [--root-path /prefix]

Thousands of adapters, some pinned, restricted, draining, failed or with hostile descriptions; a pool that is too small
for those in use, so that adapters come and go; traffic; errors. With `--keys` it needs one of the keys that it prints.
`kill -USR1` makes the engine hang (and answer again); end it with Ctrl-C and start it again on the same port to see
the page lose its server and find it again.
"""

import argparse
import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

from integration.console.chat import add_chat
from integration.console.contents import fill
from perft.logs import escape_records
from server.app.connections import uvicorn_arguments
from server.settings.model import Settings
from tests.server.fake_server import bearer, build_app, settings_of
from tests.server.fakes import FakeEngine, ready_status

POOL_ROWS = 2000
HOST_BYTES = 400_000
OPERATIONS = ("status", "counters", "inventory", "prepare", "place", "evict", "drop", "forget")
CLIENTS = 10
USED = 40
"""How many adapters the traffic asks for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--names", type=int, default=5000)
    parser.add_argument("--keys", action="store_true", help="with API keys, an admin key and a metrics key")
    parser.add_argument("--quiet", action="store_true", help="no traffic")
    parser.add_argument("--friendly", action="store_true", help="without hostile names and descriptions")
    parser.add_argument("--root-path", default="")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="console-demo-") as folder:
        store = Path(folder) / "store"
        names = fill(store, args.names, not args.friendly)
        settings = demo_settings(store, args.keys)
        app = demo_app(settings)
        if not args.quiet:
            with_traffic(app, names, f"http://127.0.0.1:{args.port}", args.keys)
        print(f"console: http://127.0.0.1:{args.port}/ ({args.names} adapters)", flush=True)
        for label in ("admin", "alice", "bob", "metrics") if args.keys else ():
            print(f"  key {label}: {key(label)}", flush=True)
        escape_records()
        uvicorn.run(
            app, host="127.0.0.1", port=args.port, log_level="warning", timeout_graceful_shutdown=1,
            root_path=args.root_path, **uvicorn_arguments(settings),
        )  # fmt: skip


def key(label: str) -> str:
    return bearer(label)["Authorization"].removeprefix("Bearer ")


def demo_settings(store: Path, has_keys: bool, **more: Any) -> Settings:
    keys = {"metrics_key": key("metrics")} if has_keys else {"api_keys": [], "admin_key": None}
    return settings_of(store, **(keys | {"host_cache_bytes": HOST_BYTES, "drain_timeout_s": 600.0} | more))


def demo_app(settings: Settings, pace: float = 1.0) -> FastAPI:
    """pace: 0 for an engine that loads and answers at once."""
    engine = FakeEngine(ready_status(POOL_ROWS))
    engine.delays = {"prepare": 0.08 * pace, "place": 0.12 * pace}
    app = build_app(settings, engine)
    add_chat(app, pace)
    Instrumentator().instrument(app)
    return app


def with_traffic(app: FastAPI, names: list[str], url: str, has_keys: bool) -> None:
    """Have the app ask itself, while it runs, for some adapters often, for others seldom, and for what is not there."""
    served = app.router.lifespan_context
    headers = bearer("admin") if has_keys else {}

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with served(app) as state:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, toggle, app.state.engine)
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=None) as client:
                tasks = [asyncio.create_task(forever(client, names, number)) for number in range(CLIENTS)]
                tasks.append(asyncio.create_task(drain(client)))
                try:
                    yield state
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    app.router.lifespan_context = lifespan


def toggle(engine: FakeEngine) -> None:
    """The engine answers nothing any more, or again."""
    engine.holds = {} if engine.holds else {operation: Path("/") for operation in OPERATIONS}


async def forever(client: httpx.AsyncClient, names: list[str], number: int) -> None:
    chance = random.Random(number)
    used = [name for name in names if name not in ("unused", "no-active-version", "nobody")][:USED]
    while True:
        await asyncio.sleep(chance.expovariate(2.0))
        model = chance.choices(
            ["base", used[int(len(used) * chance.random() ** 2)], "not-there"], weights=(2, 10, 0.2)
        )[0]
        question = f"question {chance.randrange(100)} of {chance.choice(('today', 'the week', 'a client'))}"
        body = {"model": model, "messages": [{"role": "user", "content": question}], "stream": True}
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_bytes():
                    if chance.random() < 0.0005:
                        break
        except httpx.HTTPError:
            await asyncio.sleep(1.0)


async def drain(client: httpx.AsyncClient) -> None:
    """Delete version 1 of `retired` while a request of it runs."""
    body = {"model": "retired@1", "max_tokens": 100_000, "stream": True, "seconds_per_token": 1.0, "prompt": "x"}
    while True:
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code == 200:
                    await client.delete("/v1/adapters/retired/versions/1")
                async for _ in response.aiter_bytes():
                    pass
        except httpx.HTTPError:
            pass
        await asyncio.sleep(2.0)


if __name__ == "__main__":
    main()
