"""Owns one replica under Ray Serve: vLLM's engine as Ray starts it, our server on its app, and Ray as its host."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters.errors import StoreError
from adapters.store.folder.lock import FolderLock
from server.api.dependencies import Services
from server.errors import StartError
from server.hosting.host import HOST_ARGUMENT
from server.ray_serve.configuration import FLAGS_KEY, prepared
from server.ray_serve.router import routing_stats
from server.routing.choice import ReplicaReport
from server.settings.model import Settings

CLOSE_TIMEOUT_S = 5.0
TESTED_RAY = "2.60.0"
CACHES_TRIED = 256

logger = logging.getLogger(__name__)


class RayHost:
    """See `server.hosting.host.Host`. Ray ends a replica: it lets responses finish, then calls the destructor."""

    def __init__(self, settings: Settings, adapters: Sequence[str]) -> None:
        self.settings, self.adapters = settings, adapters
        self.services: Services | None = None
        self._watching: asyncio.Task[None] | None = None

    def serving(self, state: State, services: Services) -> None:
        """See `Host.serving`."""
        self.services = services
        self._watching = asyncio.get_running_loop().create_task(self._refuse_after_death(services))

    async def _refuse_after_death(self, services: Services) -> None:
        """Once the engine died, nothing new is admitted; Ray's health check replaces the replica."""
        death = await services.engine_health.died()
        logger.critical("%s; Ray Serve replaces this replica", death)
        services.lifecycle.is_draining = True
        services.lifecycle.reason = f"{death}; retry on another server"

    def problem(self) -> str | None:
        """Why no request should come here; None if any may."""
        if self.services is None:
            return "the server is starting"
        if self.services.lifecycle.is_draining:
            return self.services.lifecycle.reason
        return self.services.engine_health.doubt() or self.services.following.problem()

    async def close(self) -> None:
        """Changes whose clients have left may finish; the store bears an end at any moment."""
        if self._watching is not None:
            self._watching.cancel()
        if self.services is not None:
            self.services.lifecycle.is_draining = True
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.services.close()


class PerftServer(LLMServer):
    """Ray Serve LLM's server, whose app carries ours: our routes, our middleware, adapters by name.

    The flags of `perft serve` are in the LLMConfig's experimental_configs; keys and other settings come from the
    environment (PERFT_*) or from the file that PERFT_CONFIG names, never through Ray, whose dashboard shows them.
    """

    async def __init__(self, llm_config: LLMConfig) -> None:  # type: ignore[misc]  # as Ray has it
        self._args = prepared(llm_config.experimental_configs[FLAGS_KEY])
        self._host = RayHost(cache_of_its_own(self._args.perft_settings, _rank()), self._args.adapter or [])
        self._reports = 0
        await super().__init__(llm_config)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Ray's own, without its routes and LoRA: the engine's app, with the arguments that our plugin needs."""
        engine: Any = self.engine
        if not hasattr(engine, "_vllm_args"):
            raise RuntimeError(
                f"found Ray {ray.__version__}, expected {TESTED_RAY}: its engine keeps vLLM's arguments elsewhere"
            )
        for name, value in vars(self._args).items():  # what Ray made of the engine's arguments stays
            if not hasattr(engine._vllm_args, name):
                setattr(engine._vllm_args, name, value)
        engine._vllm_args.host = self._args.host
        setattr(engine._vllm_args, HOST_ARGUMENT, self._host)
        app: Any = await engine.build_asgi_app()
        app.middleware_stack = _without_request_id(app.middleware_stack or app.build_middleware_stack())
        return cast(ASGIApp, app)

    async def check_health(self) -> None:
        """Raises once the engine is dead: Ray then starts another replica. One that only lags is left alone."""
        services = self._host.services
        if services is not None and (death := services.engine_health.death) is not None:
            raise RuntimeError(death)
        await super().check_health()

    async def record_routing_stats(self) -> dict[str, Any]:
        """What Ray's controller passes on to the routers."""
        services = self._host.services
        self._reports += 1
        report = ReplicaReport(
            number=self._reports,
            rank=_rank(),
            ready=self._host.problem() is None,
            running=0 if services is None else services.lifecycle.responses_running,
            metrics=None if services is None else services.metrics_address,
        )
        return routing_stats(report)

    async def __del__(self) -> None:
        """Ray calls and awaits it, once no response is under way."""
        await self._host.close()


def _without_request_id(app: ASGIApp) -> ASGIApp:
    """Ray puts the request's ID on every response itself: a second one would make it a list."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [header for header in message.get("headers", []) if header[0].lower() != b"x-request-id"]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, once)

    return answer


def cache_of_its_own(settings: Settings, rank: int) -> Settings:
    """With a folder of the replica's own for adapters: by its rank, or the next that no other replica uses."""
    folders = [settings.adapter_cache / f"replica-{(rank + step) % CACHES_TRIED}" for step in range(CACHES_TRIED)]
    for folder in folders:
        if _is_free(folder):
            return settings.model_copy(update={"adapter_cache": folder})
    raise StartError(
        f"--adapter-cache {settings.adapter_cache}: found {CACHES_TRIED} folders in use, expected one free"
    )


def _is_free(folder: Path) -> bool:
    try:
        if (folder / "lock").exists():
            FolderLock(folder / "lock").release()
    except StoreError:
        return False
    return True


def _rank() -> int:
    rank: int = serve.get_replica_context().rank.rank
    return rank
