"""Owns the flags of `perft serve`: every flag of `vllm serve`, ours beside them, and which of vLLM's are refused."""

from argparse import Namespace

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adapters import Limits
from perft.engine.settings import SETTINGS_KEY, EngineSettings
from server.errors import StartError

DESCRIPTION = """Serve a Mixture-of-Experts base model and its PERFT adapters, selected by name through the OpenAI API.
Flags by group: --help=PERFT, --help=Frontend, ...; all of them: --help=all."""
DEFAULT_HOST = "127.0.0.1"
DEFAULT_MAX_LORAS = 256
WORKER_EXTENSION = "perft.engine.worker.PerftWorkerExtension"


def make_parser() -> FlexibleArgumentParser:
    """vLLM's own parser with one more group of flags."""
    parser = make_arg_parser(FlexibleArgumentParser(prog="perft serve", description=DESCRIPTION))
    group = parser.add_argument_group("PERFT", "Routed adapters served beside the base model.")
    group.add_argument("--adapter", action="append", metavar="NAME=PATH", help="serve the adapter folder PATH as NAME")
    group.add_argument("--pool-rows", type=int, help="rows of the device pool (default: 5%% of the device's memory)")
    group.add_argument(
        "--allow-other-base", action="store_true", help="take adapters whose base_fingerprint is another base's"
    )
    group.add_argument(
        "--max-adapter-bytes", type=int, default=Limits.max_weights_bytes, help="largest weights file of an adapter"
    )
    parser.set_defaults(host=DEFAULT_HOST)
    return parser


def limits_of(args: Namespace) -> Limits:
    """The operator's limits; those of vLLM's own server are the defaults."""
    default = Limits()
    return Limits(
        getattr(args, "max_adapter_bytes", default.max_weights_bytes),
        getattr(args, "allow_other_base", default.allow_other_base),
    )


def base_names(args: Namespace) -> list[str]:
    """The names the base is served under."""
    return list(args.served_model_name or [args.model])


def argument_problems(args: Namespace) -> list[str]:
    """Every flag that asks for what PERFT does not serve; known before anything is loaded."""
    refused = {
        "--api-server-count": (args.api_server_count or 1) > 1,
        "--data-parallel-size": args.data_parallel_size > 1,
        "--pipeline-parallel-size": args.pipeline_parallel_size > 1,
        "--enable-expert-parallel": args.enable_expert_parallel,
        "--enable-eplb": args.enable_eplb,
        "--enable-dbo": args.enable_dbo,
        "--speculative-config": args.speculative_config is not None,
        "--headless": args.headless,
        "--grpc": args.grpc,
    }
    problems = [f"{flag}: not tested with PERFT yet; leave it off" for flag, given in refused.items() if given]
    if args.lora_modules:
        problems.append("--lora-modules: give adapters with --adapter NAME=PATH")
    if args.worker_extension_cls:
        problems.append(f"--worker-extension-cls: {WORKER_EXTENSION} takes that place")
    return problems


def prepare_arguments(args: Namespace) -> None:
    """Fill in what PERFT needs of vLLM: LoRA's way through the engine, eager mode, our worker extension.

    Raises StartError naming every flag that is refused.
    """
    if args.model_tag is not None:
        args.model = args.model_tag
    if problems := argument_problems(args):
        raise StartError("\n".join(problems))
    args.api_server_count = 1
    args.enable_lora = True
    if args.max_loras == 1 and not args.lora_target_modules:  # PERFT pays nothing per slot, vLLM's LoRA does
        args.max_loras = max(DEFAULT_MAX_LORAS, len(args.adapter or []))
    args.enforce_eager = True
    args.worker_extension_cls = WORKER_EXTENSION
    settings = EngineSettings(args.pool_rows, args.allow_other_base, args.max_adapter_bytes)
    args.additional_config = {**(args.additional_config or {}), SETTINGS_KEY: settings.__dict__}
