"""Entry point of `vllm.endpoint_plugins`: hangs our part onto vLLM's own FastAPI app, in the API process.

vLLM loads it only where VLLM_PLUGINS names it, as `perft serve` does; without it vLLM's own server serves the
adapters of its `--lora-modules`.
"""

import asyncio
from argparse import Namespace

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient

from server.arguments import limits_of
from server.banner import announce
from server.errors import StartError
from server.model_check import ModelCheck
from server.registry import Registry
from server.routes import router
from server.start import parse_named_folders, serve_at_start
from server.vllm_engine import VllmEngine, lora_request


class PerftEndpoints:
    """vLLM's EndpointPlugin: routes first, then (once the engine is up) what they need."""

    name = "perft_server"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.add_middleware(ModelCheck)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Load the adapters given at start and let vLLM's handlers know their names."""
        if engine_client is None:
            raise StartError("PERFT adapters need an engine; this is a server without one")
        models = state.openai_serving_models
        registry = Registry([path.name for path in models.base_model_paths])
        state.perft_registry, state.perft_engine = registry, VllmEngine(engine_client)
        state.perft_max_model_len = engine_client.model_config.max_model_len
        folders = parse_named_folders(getattr(args, "adapter", None) or [], registry.base_names)
        await serve_at_start(state.perft_engine, folders, registry, limits_of(args))
        models.lora_requests.update({k: lora_request(v) for k, v in registry.selectable().items()})
        state.perft_banner = asyncio.create_task(announce(state, args, registry))


def create() -> PerftEndpoints:
    return PerftEndpoints()
