"""Owns the Ray Serve application: `import_path: server.ray_serve.application:build` in a Serve config file."""

import dataclasses
import os
from argparse import Namespace
from typing import Any

from pydantic import ValidationError
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_openai_app
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs

from server.errors import StartError
from server.ray_serve.configuration import FLAGS_KEY, RayArguments, prepared
from server.ray_serve.needs import check_switches
from server.ray_serve.router import AdapterRouter
from server.settings.model import Settings

RAYS_OWN = ("model", "model_tag", "served_model_name", "distributed_executor_backend", "api_key", "host", "port", "uds")
"""Arguments of vLLM that Ray Serve LLM sets, or that have no meaning where Ray listens."""
PASSED_ON = ("VLLM_", "TORCHDYNAMO_DISABLE")
"""How the variables begin that `prepare` sets, and that a replica's process needs from its start."""
LAST_CHANGES_S = 30.0


def build(args: dict[str, Any]) -> Application:
    """The application of a config file's `args` (see RayArguments). Raises StartError for what no replica could start
    with: flags, keys, adapters and the store are checked here, where the message is seen at once."""
    check_switches()
    try:
        arguments = RayArguments(**args)
    except ValidationError as error:
        lines = [f"args.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise StartError("\n".join(lines)) from None
    parsed = prepared(arguments.command_line)
    settings: Settings = parsed.perft_settings
    if arguments.replicas > 1 and not isinstance(settings.adapter_store, str):
        raise StartError(
            f"--adapter-store: found the folder {settings.adapter_store}, which one server can use, expected an "
            "address that replicas share: file:///PATH, s3://, gs://, az://"
        )
    options = {
        "num_replicas": arguments.replicas,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s + LAST_CHANGES_S,
        "request_router_config": RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"base_names": [arguments.name]},
            request_routing_stats_period_s=arguments.stats_period_s,
        ),
    }
    if "autoscaling_config" in arguments.deployment:
        del options["num_replicas"]
    config = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=arguments.name, model_source=arguments.model),
        server_cls="server.ray_serve.replica:PerftServer",
        engine_kwargs=engine_arguments(parsed),
        accelerator_config={"kind": arguments.device},
        deployment_config=options | arguments.deployment,
        experimental_configs={FLAGS_KEY: arguments.command_line},
        log_engine_metrics=False,
        **({"runtime_env": {"env_vars": _variables()}} | arguments.llm),
    )
    return build_openai_app({"llm_configs": [config]})


def engine_arguments(parsed: Namespace) -> dict[str, Any]:
    """What differs from vLLM's defaults in the arguments of an engine and of its app, as Ray passes it to vLLM."""
    found: dict[str, Any] = {}
    for of in (AsyncEngineArgs, FrontendArgs):
        defaults = of()
        for field in dataclasses.fields(of):
            value, default = getattr(parsed, field.name, None), getattr(defaults, field.name)
            if field.name not in RAYS_OWN and value is not None and value != default:
                found[field.name] = value
    return found


def _variables() -> dict[str, str]:
    return {
        name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and "KEY" not in name.split("_")
    }
