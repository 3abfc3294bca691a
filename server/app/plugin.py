"""Entry point of `vllm.endpoint_plugins`: hangs our part onto vLLM's own FastAPI app, in the API process.

vLLM loads it only where VLLM_PLUGINS names it, as `perft serve` does; without it vLLM's own server serves the
adapters of its `--lora-modules`, and no changing route is there.
"""

import asyncio
from argparse import Namespace
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from perft.engine.peft_lora import lora_problem, peft_lora_violations
from server.api.route_table import missing, prune
from server.app.banner import banner
from server.app.services import Runtime, dress, limits_of
from server.app.startup import check_status, parse_named_folders, serve_at_start
from server.app.warm_up import warm_up
from server.auth.origin import is_local_bind
from server.engine.vllm import VllmEngine, lora_request
from server.errors import StartError
from server.inference.engine_hook import EngineHook
from server.settings.sources import Settings
from server.uploads.validate import LoRACheck

LAST_RESPONSES_S = 5
"""How long the server, once it ends, waits for responses that nobody reads and uploads that do not come."""


class PerftEndpoints:
    """vLLM's EndpointPlugin: routes first, then (once the engine is up) what they need."""

    name = "perft_server"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        dress(app)
        self._app = app

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Open the store, load the adapters given at start, and only then open the doors. Raises StartError."""
        if engine_client is None:
            raise StartError("PERFT adapters need an engine; this is a server without one")
        settings: Settings | None = getattr(args, "perft_settings", None)
        if settings is None:
            raise StartError("the endpoint plugin perft_server is a part of `perft serve`: start that")
        prune(self._app)
        if lacking := missing(self._app):
            raise StartError(f"vLLM's app lacks the routes {[f'{route.method} {route.path}' for route in lacking]}")
        engine = VllmEngine(engine_client)
        status = await engine.status()
        check_status(status)
        await warm_up(engine_client)
        models = state.openai_serving_models
        runtime = Runtime(engine, settings, status, [path.name for path in models.base_model_paths])
        await runtime.start(
            table=models.lora_requests,
            entry=lambda version: lora_request(version.engine),
            abort=engine_client.abort,
            max_running=engine_client.vllm_config.lora_config.max_loras,
            check_lora=_lora_check(engine_client.vllm_config, settings),
        )
        inference = EngineHook(runtime.catalog, runtime.metrics, runtime.limits, settings.load_timeout_s)
        inference.observe(engine_client)
        runtime.base_running = lambda: inference.base_running
        state.perft_max_model_len = engine_client.model_config.max_model_len
        await serve_at_start(runtime.catalog, parse_named_folders(args.adapter or [], runtime.base_names))
        runtime.fill(state, is_local_bind(args.host, args.uds))
        state.perft_started = asyncio.create_task(_once_listening(state, args, runtime))


def _lora_check(vllm_config: Any, settings: Settings) -> LoRACheck | None:
    """How PEFT LoRA adapters are checked; None where they are not taken."""
    if lora_problem(vllm_config) is not None:
        return None
    return partial(peft_lora_violations, vllm_config=vllm_config, limits=limits_of(settings))


async def _once_listening(state: State, args: Namespace, runtime: Runtime) -> None:
    """Once the server listens (and vLLM's signal handlers are set): drain on SIGTERM, say what is served."""
    while not getattr(getattr(state, "server", None), "started", False):
        await asyncio.sleep(0.1)
    state.server.config.timeout_graceful_shutdown = LAST_RESPONSES_S
    runtime.drain.take_signal(runtime.settings.shutdown_timeout_s)
    print(banner(args, runtime), flush=True)


def create() -> PerftEndpoints:
    return PerftEndpoints()
