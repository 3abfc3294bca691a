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
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from perft.engine.grammar_probe import install_validation, pack_setup
from perft.engine.peft_lora import check_peft_lora, lora_problem
from perft.logs import escape_records
from server.api import health, metrics, models
from server.api.adapters import changes, files, reading, upload
from server.api.control_planes import loading
from server.api.error_responses import answer_invalid, as_api_error
from server.api.openapi import describe
from server.api.route_table import ROUTES, missing, more_routes, prune
from server.app import serving_log
from server.app.given_adapters import store_given_adapters
from server.app.http_metrics import count_every_answer
from server.app.services import EngineSide, build_services
from server.app.startup import check_status, warm_up
from server.auth.origin import bind_problem, is_local_bind
from server.bodies.models import RequestModel
from server.bodies.texts import TextTurns
from server.console import routes as console
from server.engine.health import CONFIRM_S, EngineHealth, WatchedEngine
from server.engine.vllm import VllmEngine, VllmProcesses, lora_request
from server.errors import EngineUnavailableError, InvalidRequestError, ServerError, StartError, StartFailedError
from server.hosting.given import parse_named_folders
from server.hosting.host import HOST_ARGUMENT, Host
from server.hosting.process import ProcessHost
from server.inference.engine_hook import EngineHook
from server.inference.request_context import CURRENT
from server.middleware.access_control import AccessControl
from server.middleware.adapter_routing import AdapterRouting
from server.middleware.cross_origin import in_our_shape
from server.middleware.drain import DrainMiddleware
from server.settings.model import Settings
from server.structured_outputs.checker import SpecChecker
from server.structured_outputs.process import Compiler, CompilerProcess
from server.uploads.validate import LoRACheck


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
        host = _host_of(args)
        settings = host.settings
        if problem := bind_problem(args.host, settings.key_ring.has_admin, args.uds):
            raise StartError(problem)
        prune(self._app, more=more_routes(settings))
        answer_in_our_shape(self._app)
        if lacking := missing(self._app, more_routes(settings)):
            raise StartError(f"vLLM's app lacks the routes {[f'{route.method} {route.path}' for route in lacking]}")
        health = EngineHealth(settings.engine_timeout_s, VllmProcesses(engine_client))
        health.start()
        tell_before_shutdown(engine_client, health)
        try:
            await self._build(engine_client, state, args, host, health)
        except EngineUnavailableError as error:
            await asyncio.sleep(2 * CONFIRM_S)  # until it is known what died
            raise StartFailedError(health.death or error.message) from error

    async def _build(
        self, engine_client: EngineClient, state: State, args: Namespace, host: Host, health: EngineHealth
    ) -> None:
        settings = host.settings
        engine = VllmEngine(engine_client)
        status = await WatchedEngine(engine, health).status()
        check_status(status)
        await health.wait(warm_up(engine_client))
        served = state.openai_serving_models
        hooks: list[EngineHook] = []
        specs = check_specs(engine_client, settings)
        side = EngineSide(
            engine=engine,
            health=health,
            status=status,
            specs=specs,
            base_names=[path.name for path in served.base_model_paths],
            max_model_len=engine_client.model_config.max_model_len,
            names=served.lora_requests,
            name_entry=lambda version: lora_request(version.ref),
            abort=engine_client.abort,
            max_running=engine_client.vllm_config.lora_config.max_loras,
            is_local=is_local_bind(args.host, args.uds),
            allowed_origins=frozenset(args.allowed_origins),
            check_lora=_lora_check(engine_client.vllm_config, settings),
            base_running=lambda: sum(hook.base_running for hook in hooks),
            max_sequences=_max_sequences(engine_client.vllm_config),
            request_models=request_models(self._app),
            takes_tools=takes_tools(state.online_renderer),
        )
        services = await build_services(side, settings)
        hook = EngineHook(
            services.registry,
            services.scheduler,
            services.metrics,
            services.rate_limits,
            settings.load_timeout_s,
            _as_vllm_error,
            health=health,
            check_spec=specs.check,
        )
        hook.install(engine_client)
        TextTurns(services.max_model_len, _refuse_text).install(engine_client.renderer)
        hooks.append(hook)
        given = parse_named_folders(host.adapters, services.base_names)
        await store_given_adapters(services.registry, services.adapters, given, services.sources)
        escape_records()
        state.services = services
        host.serving(state, services)


def _host_of(args: Namespace) -> Host:
    """Who runs this server. Raises StartError if that is neither `perft serve` nor another that knows us."""
    if (run := getattr(args, "perft_run", None)) is not None:
        return ProcessHost(args.perft_settings, args.adapter or [], args, run)
    host: Host | None = getattr(args, HOST_ARGUMENT, None)
    if host is None:
        raise StartError("the endpoint plugin perft_server is a part of `perft serve`; run that")
    return host


def check_specs(client: EngineClient, settings: Settings) -> SpecChecker:
    """What checks structured-output specs; its process begins to load. vLLM's own validation, which would compile them
    on the event loop, gives way to it."""
    compiler = Compiler("perft.engine.grammar_probe:make_probe", pack_setup(client.vllm_config))
    process = CompilerProcess(compiler, settings.structured_memory_bytes)
    process.start()
    specs = SpecChecker(process, settings.structured_max_bytes, settings.structured_compile_s)

    def validate(structured_outputs: Any) -> None:
        try:
            specs.check_bounds(structured_outputs)
        except InvalidRequestError as error:
            raise VLLMValidationError(error.message, parameter=error.param) from error

    install_validation(validate)
    return specs


def answer_in_our_shape(app: FastAPI) -> None:
    """Have vLLM's app answer a body that does not fit as we do (its own handler says it in Python's words), and keep
    clients' mistakes out of its log. vLLM registers its handlers after our `attach` and builds the middleware then."""
    app.add_exception_handler(RequestValidationError, answer_invalid)
    in_our_shape(app.user_middleware)
    if app.middleware_stack is not None:
        app.middleware_stack = app.build_middleware_stack()
    serving_log.install()


def tell_before_shutdown(client: EngineClient, health: EngineHealth) -> None:
    """What vLLM ends the engine with tells `health` first: such an end is no death."""
    inner = client.shutdown

    def shutdown(timeout: float | None = None) -> None:
        health.ending()
        inner(timeout=timeout)

    client.shutdown = shutdown


def attach(app: FastAPI) -> None:
    """Add our routes and middleware to an app; the middleware added last is the outermost."""
    for module in (reading, upload, changes, files, models, metrics, health, loading, console):
        app.include_router(module.router)
    describe(app)
    for middleware in (AdapterRouting, DrainMiddleware, AccessControl):
        app.add_middleware(middleware)
    count_every_answer(app)


def _as_vllm_error(error: ServerError) -> Exception:
    """What makes vLLM's handlers answer with one of our errors; `middleware/stream_errors` gives it our shape."""
    shown: Exception = GracefulHTTPError(error.message, HTTPStatus(as_api_error(error).status))
    return shown


def request_models(app: FastAPI) -> dict[str, RequestModel]:
    """path -> what is known of the request model of the app's route there, where `model` selects an adapter."""
    selecting = {route.path for route in ROUTES if route.selects_model}
    return {
        route.path: RequestModel.of(route.body_field.field_info.annotation)
        for route in app.routes
        if isinstance(route, APIRoute) and route.path in selecting and route.body_field is not None
    }


def takes_tools(renderer: Any) -> bool:
    """Whether vLLM can read calls of tools from an answer: it was started with a parser of them, or the model has its
    own. (Without one /v1/responses would drop the tools in silence.)"""
    return bool(renderer.use_harmony or getattr(renderer.parser, "tool_parser_cls", None) is not None)


def _refuse_text(error: InvalidRequestError) -> Exception:
    """What ends vLLM's handler for a text that is too long."""
    if (context := CURRENT.get()) is not None:
        context.failure = error
    return _as_vllm_error(error)


def _max_sequences(vllm_config: Any) -> int:
    """Sequences that the engine runs at once; further ones wait here, where keys take turns."""
    most: int = vllm_config.scheduler_config.max_num_seqs * vllm_config.parallel_config.data_parallel_size
    return most


def _lora_check(vllm_config: Any, settings: Settings) -> LoRACheck | None:
    """How PEFT LoRA adapters are checked; None where they are not served."""
    if lora_problem(vllm_config) is not None:
        return None
    return partial(check_peft_lora, vllm_config=vllm_config, limits=settings.adapter_limits)


def create() -> PerftEndpoints:
    return PerftEndpoints()
