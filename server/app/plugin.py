"""Entry point of `vllm.endpoint_plugins`: adds our server to vLLM's own FastAPI app, in the API process.

vLLM loads it only where VLLM_PLUGINS names it, as `perft serve` does; without it vLLM's own server serves the adapters
of its `--lora-modules`, and no route that changes adapters exists.
"""

import asyncio
from argparse import Namespace
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError

from perft.engine.peft_lora import check_peft_lora, lora_problem
from server.api import adapters, health, metrics, models
from server.api.error_responses import as_api_error
from server.api.openapi import describe
from server.api.route_table import missing, prune
from server.app.given_adapters import parse_named_folders, store_given_adapters
from server.app.services import EngineSide, build_services
from server.app.startup import banner, check_status, warm_up
from server.auth.origin import is_local_bind
from server.engine.vllm import VllmEngine, lora_request
from server.errors import ServerError, StartError
from server.inference.engine_hook import EngineHook
from server.middleware.access_control import AccessControl
from server.middleware.adapter_routing import AdapterRouting
from server.middleware.drain import DrainMiddleware, SignalHandler
from server.settings.model import Settings
from server.uploads.validate import LoRACheck

LAST_RESPONSES_S = 5
"""Seconds that the server, once it ends, waits for responses that are not read and uploads that do not arrive."""


class PerftEndpoints:
    """vLLM's EndpointPlugin: routes first, then (once the engine is up) what they need."""

    name = "perft_server"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        attach(app)
        self._app = app

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Open the store, load the adapters given at start, and only then admit requests. Raises StartError."""
        if engine_client is None:
            raise StartError("PERFT adapters need an engine; found a server without one")
        settings: Settings | None = getattr(args, "perft_settings", None)
        if settings is None:
            raise StartError("the endpoint plugin perft_server is a part of `perft serve`; run that")
        prune(self._app)
        if lacking := missing(self._app):
            raise StartError(f"vLLM's app lacks the routes {[f'{route.method} {route.path}' for route in lacking]}")
        engine = VllmEngine(engine_client)
        status = await engine.status()
        check_status(status)
        await warm_up(engine_client)
        served = state.openai_serving_models
        hooks: list[EngineHook] = []
        side = EngineSide(
            engine=engine,
            status=status,
            base_names=[path.name for path in served.base_model_paths],
            max_model_len=engine_client.model_config.max_model_len,
            names=served.lora_requests,
            name_entry=lambda version: lora_request(version.ref),
            abort=engine_client.abort,
            max_running=engine_client.vllm_config.lora_config.max_loras,
            is_local=is_local_bind(args.host, args.uds),
            check_lora=_lora_check(engine_client.vllm_config, settings),
            base_running=lambda: sum(hook.base_running for hook in hooks),
        )
        services = await build_services(side, settings)
        hook = EngineHook(
            services.registry,
            services.scheduler,
            services.metrics,
            services.rate_limits,
            settings.load_timeout_s,
            _as_vllm_error,
        )
        hook.install(engine_client)
        hooks.append(hook)
        given = parse_named_folders(args.adapter or [], services.base_names)
        await store_given_adapters(services.registry, services.adapters, given)
        state.services = services
        drain = SignalHandler(services.lifecycle, settings.shutdown_timeout_s, services.close)
        state.perft_startup = asyncio.create_task(_once_listening(state, drain, banner(args, services)))


def attach(app: FastAPI) -> None:
    """Add our routes and middleware to an app; the middleware added last is the outermost."""
    for module in (adapters, models, metrics, health):
        app.include_router(module.router)
    describe(app)
    for middleware in (AdapterRouting, DrainMiddleware, AccessControl):
        app.add_middleware(middleware)


def _as_vllm_error(error: ServerError) -> Exception:
    """What makes vLLM's handlers answer with one of our errors; `middleware/stream_errors` gives it our shape."""
    shown: Exception = GracefulHTTPError(error.message, HTTPStatus(as_api_error(error).status))
    return shown


def _lora_check(vllm_config: Any, settings: Settings) -> LoRACheck | None:
    """How PEFT LoRA adapters are checked; None where they are not served."""
    if lora_problem(vllm_config) is not None:
        return None
    return partial(check_peft_lora, vllm_config=vllm_config, limits=settings.adapter_limits)


async def _once_listening(state: State, drain: SignalHandler, text: str) -> None:
    """Once the server listens (and vLLM's signal handlers are set): drain on SIGTERM, print the banner."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.1)
    state.server.config.timeout_graceful_shutdown = LAST_RESPONSES_S
    drain.install()
    print(text, flush=True)


def create() -> PerftEndpoints:
    return PerftEndpoints()
