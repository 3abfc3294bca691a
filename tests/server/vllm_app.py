"""vLLM's own app, routers and handlers behind our middleware, over an engine client that generates nothing real.

What vLLM checks before and while it calls the engine is checked: tokenizer, templates, sampling parameters. The engine
itself is scripted, so that a test of every route takes milliseconds.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from fastapi import FastAPI

from server.app.plugin import _refuse_text, answer_in_our_shape, attach, request_models, takes_tools
from server.app.services import EngineSide, build_services
from server.bodies.texts import TextTurns
from server.engine.health import EngineHealth
from server.engine.vllm import lora_request
from server.inference.engine_hook import EngineHook
from server.settings.model import Settings
from tests.server import tiny_server
from tests.server.fakes import FakeEngine

LENGTH = 384
TOKENS = [5, 6, 7, 8]
"""What every request is answered with, one token at a time."""


@dataclass
class ScriptedClient:
    """An EngineClient that checks as vLLM's does. before: called before every token, with its number."""

    vllm_config: Any
    before: Callable[[int], Any] = lambda number: None
    dead: BaseException | None = None
    aborted: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        from vllm.renderers import renderer_from_config
        from vllm.v1.engine.input_processor import InputProcessor

        self.model_config = self.vllm_config.model_config
        self.renderer = renderer_from_config(self.vllm_config)
        self.input_processor = InputProcessor(self.vllm_config, self.renderer)

    @property
    def errored(self) -> bool:
        return self.dead is not None

    @property
    def dead_error(self) -> BaseException:
        assert self.dead is not None
        return self.dead

    is_running = True
    is_stopped = False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        pass

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    async def is_tracing_enabled(self) -> bool:
        return False

    async def reset_mm_cache(self) -> None:
        pass

    async def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        from vllm.logprobs import Logprob
        from vllm.outputs import CompletionOutput, RequestOutput

        self.input_processor.process_inputs(request_id, prompt, sampling_params, ("generate",))
        ids = list(prompt["prompt_token_ids"])
        count = min(len(TOKENS), sampling_params.max_tokens or len(TOKENS))
        for number in range(count):
            found = self.before(number)
            if asyncio.iscoroutine(found):
                await found
            if self.dead is not None:
                raise self.dead
            is_last, is_aborted = number == count - 1, bool(self.aborted & {request_id, "*"})
            reason = "abort" if is_aborted else "length" if is_last else None
            token = TOKENS[number]
            logprobs = None if sampling_params.logprobs is None else [{token: Logprob(-0.1, 1, f"t{token}")}]
            ranked = [None, *({token: Logprob(-0.1, 1, f"t{token}")} for token in ids[1:])]
            output = CompletionOutput(
                index=0, text=f" t{token}", token_ids=[token], cumulative_logprob=None, logprobs=logprobs,
                finish_reason=reason,
            )  # fmt: skip
            of_prompt: Any = None if sampling_params.prompt_logprobs is None else ranked
            yield RequestOutput(
                request_id, None, ids, of_prompt, [output], reason is not None, lora_request=lora_request
            )
            if is_aborted:
                return


@dataclass
class Processes:
    """Of the scripted engine (server.engine.health.EngineProcesses)."""

    client: ScriptedClient

    def is_dead(self) -> bool:
        return self.client.errored

    def death(self) -> str:
        return "it was scripted"

    def was_asked_to_end(self) -> bool:
        return False


@dataclass
class World:
    """A running app. client: of its engine."""

    app: FastAPI
    client: ScriptedClient
    engine: FakeEngine


async def accept_spec(params: Any, label: str | None) -> None:
    """Structured outputs are checked elsewhere, in a process of their own."""


@asynccontextmanager
async def running(model: Path, settings: Settings, engine: FakeEngine) -> AsyncIterator[World]:
    """The app of a server of `model`, as `perft serve` puts it together, once its engine is up."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    from server.api.route_table import more_routes, prune
    from server.app.plugin import _as_vllm_error
    from server.hosting.arguments import parse_arguments

    with patch.dict(os.environ, {"VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS", "")}):  # later servers load them
        args = parse_arguments([
            "serve", str(model), "--served-model-name", tiny_server.BASE_NAME, "--dtype", "float32",
            "--max-model-len", str(LENGTH), "--enforce-eager",
        ][1:])  # fmt: skip
        args.model, args.gpu_memory_utilization = str(model), 0.5
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
        with patch("vllm.entrypoints.launchers.app.attach_endpoint_plugins", lambda app, tasks: attach(app)):
            app = build_app(args, ("generate",), config.model_config)
        client = ScriptedClient(config)
        await init_app_state(client, app.state, args, ("generate",))  # type: ignore[arg-type]
    prune(app, more=more_routes(settings))
    answer_in_our_shape(app)
    health = EngineHealth(settings.engine_timeout_s, Processes(client))
    served = app.state.openai_serving_models
    side = EngineSide(
        engine=engine,
        health=health,
        status=await engine.status(),
        base_names=[tiny_server.BASE_NAME],
        max_model_len=LENGTH,
        names=served.lora_requests,
        name_entry=lambda version: lora_request(version.ref),
        abort=client.abort,
        max_running=8,
        is_local=True,
        request_models=request_models(app),
        takes_tools=takes_tools(app.state.online_renderer),
    )
    services = await build_services(side, settings)
    hook = EngineHook(
        services.registry, services.scheduler, services.metrics, services.rate_limits, settings.load_timeout_s,
        _as_vllm_error, health=health, check_spec=accept_spec,
    )  # fmt: skip
    hook.install(client)  # type: ignore[arg-type]
    TextTurns(services.max_model_len, _refuse_text).install(client.renderer)
    app.state.services, app.state.server = services, SimpleNamespace(should_exit=False)
    try:
        yield World(app, client, engine)
    finally:
        await services.close()
