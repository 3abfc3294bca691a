"""Owns the flags of `perft serve`: all of `vllm serve`, ours, and which of vLLM's are rejected."""

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.launchers.utils.constants import (
    H11_MAX_HEADER_COUNT_DEFAULT,
    H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT,
)
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from perft.engine.compatibility import SPECULATIVE_METHOD
from perft.engine.settings import SETTINGS_KEY, EngineSettings
from server.auth.origin import bind_problem
from server.engine.cpu import use_cpu_defaults
from server.errors import StartError
from server.settings import sources

DESCRIPTION = """Serve a Mixture-of-Experts base model and its PERFT adapters, selected by name through the OpenAI API.
Flags by group: --help=PERFT, --help=Frontend, ...; all of them: --help=all."""
DEFAULT_HOST = "127.0.0.1"
DEFAULT_MAX_LORAS = 256
LORA_SLOTS = 8
DEFAULT_MODEL = AsyncEngineArgs.model
WORKER_EXTENSION = "perft.engine.worker.PerftWorkerExtension"
STRUCTURED_BACKEND = "xgrammar"
SCHEDULER = "perft.engine.scheduler.make_scheduler"
ADAPTER_HELP = (
    "serve the adapter in the folder PATH as NAME; or of a URL, hf://OWNER/REPO[@REVISION], s3://BUCKET/PREFIX"
)
REPEATED = {"adapter": "--adapter", **sources.repeated_flags()}
"""Attribute -> flag that can be repeated."""


class Parser(FlexibleArgumentParser):
    """vLLM's parser passes a list in its config file as one flag with many values; our repeated flags take one each."""

    def load_config_file(self, file_path: str) -> list[str]:
        many = {spelling for flag in REPEATED.values() for spelling in _spellings(flag)}
        given: list[str] = []
        flag = ""
        for word in super().load_config_file(file_path):
            flag = word if word.startswith("--") else flag
            is_next = flag in many and word != flag and given[-1:] != [flag]
            given += [flag, word] if is_next else [word]
        return given


def make_parser() -> FlexibleArgumentParser:
    """vLLM's parser with one more group of flags."""
    parser = make_arg_parser(Parser(prog="perft serve", description=DESCRIPTION))
    group = parser.add_argument_group("PERFT", "Routed adapters served beside the base model.")
    group.add_argument("--adapter", action="append", metavar="NAME=PATH", help=ADAPTER_HELP)
    sources.add_flags(group)
    parser.set_defaults(host=DEFAULT_HOST, max_loras=None, gpu_memory_utilization=None)
    return parser


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Parse the command line. Repeated flags are read first: vLLM's parser warns of every flag that is given twice.

    Their values in vLLM's `--config FILE.yaml` come first.
    """
    repeated = ArgumentParser(prog="perft serve", add_help=False, allow_abbrev=False)
    for attribute, flag in REPEATED.items():
        repeated.add_argument(*_spellings(flag), dest=attribute, action="append", default=SUPPRESS)
    given, rest = repeated.parse_known_args(argv)
    args: Namespace = make_parser().parse_args(rest)
    for attribute, items in vars(given).items():
        setattr(args, attribute, (getattr(args, attribute, None) or []) + items)
    return args


def _spellings(flag: str) -> list[str]:
    return sorted({flag, "--" + flag.removeprefix("--").replace("-", "_")})


def base_names(args: Namespace) -> list[str]:
    """The names the base is served under."""
    return list(args.served_model_name or [args.model])


def argument_problems(args: Namespace) -> list[str]:
    """Every flag that asks for something PERFT does not support, checked before anything is loaded."""
    refused = {
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--data-parallel-size": args.data_parallel_size > 1,
        "--data-parallel-rank": args.data_parallel_rank is not None,
        "--data-parallel-external-lb": args.data_parallel_external_lb,
        "--pipeline-parallel-size": args.pipeline_parallel_size > 1,
        "--decode-context-parallel-size": args.decode_context_parallel_size > 1,
        "--prefill-context-parallel-size": args.prefill_context_parallel_size > 1,
        "--nnodes": args.nnodes > 1,
        "--enable-expert-parallel": args.enable_expert_parallel,
        "--enable-eplb": args.enable_eplb,
        "--enable-elastic-ep": args.enable_elastic_ep,
        "--enable-dbo": args.enable_dbo,
        "--ubatch-size": args.ubatch_size > 0,
        "--kv-sharing-fast-prefill": args.kv_sharing_fast_prefill,
        "--kv-transfer-config": args.kv_transfer_config is not None,
        "--kv-offloading-size": args.kv_offloading_size is not None,
        "--enable-sleep-mode": args.enable_sleep_mode,
        "--runner": args.runner not in ("auto", "generate"),
        "--headless": args.headless,
        "--grpc": args.grpc,
    }
    problems = [f"{flag}: not tested with PERFT yet; leave it off" for flag, given in refused.items() if given]
    if args.h11_max_incomplete_event_size != H11_MAX_INCOMPLETE_EVENT_SIZE_DEFAULT:
        problems.append("--h11-max-incomplete-event-size: no effect on this server; use --max-header-bytes")
    if args.h11_max_header_count != H11_MAX_HEADER_COUNT_DEFAULT:
        problems.append("--h11-max-header-count: no effect on this server; use --max-headers")
    speculative = args.speculative_config
    if speculative is not None and speculative.get("method") != SPECULATIVE_METHOD:
        problems.append(
            f"--speculative-config: found method {speculative.get('method')!r}, expected {SPECULATIVE_METHOD!r}, the "
            "one that is tested with PERFT"
        )
    problems += [problem for module in args.lora_modules or [] if (problem := module_problem(module, args))]
    if args.default_mm_loras:
        problems.append("--default-mm-loras: not supported; requests select an adapter by their model")
    if args.worker_extension_cls:
        problems.append(f"--worker-extension-cls: PERFT needs {WORKER_EXTENSION} there; leave it off")
    if SETTINGS_KEY in (args.additional_config or {}):
        problems.append(f"--additional-config: {SETTINGS_KEY!r} is set by PERFT's own flags; leave it out")
    if args.structured_outputs_config.backend not in ("auto", STRUCTURED_BACKEND):
        problems.append(
            f"--structured-outputs-config: found backend {args.structured_outputs_config.backend!r}, expected "
            f"{STRUCTURED_BACKEND!r}: specs are tried with that one before they reach the engine; leave it out"
        )
    if args.scheduler_cls:
        problems.append(f"--scheduler-cls: PERFT needs {SCHEDULER} there; leave it off")
    return problems


def module_problem(module: Any, args: Namespace) -> str | None:
    """Why one of vLLM's `--lora-modules` cannot be an `--adapter NAME=PATH`; None if it can."""
    bases = {*base_names(args), args.model}
    if "=" in module.name:
        return f"--lora-modules: found the name {module.name!r}, expected one without '='"
    if module.base_model_name is not None and module.base_model_name not in bases:
        found = f"--lora-modules {module.name}: found base_model_name {module.base_model_name!r}"
        return f"{found}, expected {' or '.join(sorted(bases))}, which is served here; leave it out"
    if module.is_3d_lora_weight:
        return f"--lora-modules {module.name}: is_3d_lora_weight: not supported; leave it out"
    return None


def prepare_arguments(args: Namespace) -> None:
    """Set what PERFT needs of vLLM: LoRA support, our worker extension and scheduler.

    Raises StartError naming every flag that is rejected.
    """
    if args.model_tag is None and args.model == DEFAULT_MODEL:
        raise StartError("found no model to serve: perft serve MODEL [--adapter NAME=PATH ...]")
    args.model = args.model_tag or args.model
    chosen = sources.load(args)
    problems = argument_problems(args)
    if problem := bind_problem(args.host, chosen.key_ring.has_admin, args.uds):
        problems.append(problem)
    if problems:
        raise StartError("\n".join(problems))
    args.perft_settings = chosen
    args.adapter = [*(args.adapter or []), *(f"{module.name}={module.path}" for module in args.lora_modules or [])]
    args.lora_modules = None  # or vLLM would load them too
    args.api_server_count = 1
    args.enable_lora = True
    if args.max_loras is None:  # adapters in one step: a slot costs PERFT nothing, vLLM's LoRA memory
        args.max_loras = LORA_SLOTS if args.lora_target_modules else DEFAULT_MAX_LORAS
        args.max_loras = min(args.max_loras, args.max_cpu_loras or args.max_loras)
    if current_platform.is_cpu():
        use_cpu_defaults(args)
    elif args.gpu_memory_utilization is None:
        args.gpu_memory_utilization = AsyncEngineArgs.gpu_memory_utilization
    args.worker_extension_cls = WORKER_EXTENSION
    args.scheduler_cls = SCHEDULER
    args.structured_outputs_config.backend = STRUCTURED_BACKEND  # with "auto" the first request would choose for all
    args.disable_uvicorn_access_log = True  # ours has the request ID, the adapter and the tokens
    args.enable_request_id_headers = False  # middleware/access_control sets them
    engine = EngineSettings(
        pool_rows=chosen.pool_rows,
        allow_other_base=chosen.allow_other_base,
        max_weights_bytes=chosen.max_adapter_bytes,
        expert_sampling=chosen.expert_sampling,
        operator_backend=chosen.operator_backend,
    )
    args.additional_config = {**(args.additional_config or {}), SETTINGS_KEY: engine.__dict__}
