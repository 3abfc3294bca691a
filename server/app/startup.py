"""Owns what happens once the engine is up and before the server answers: checks, a warm-up request, the banner."""

import shlex
from argparse import Namespace
from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMError
from vllm.sampling_params import SamplingParams

from server.api.dependencies import Services
from server.auth.keys import Caller
from server.engine.protocol import EngineStatus
from server.errors import StartError


def check_status(status: EngineStatus) -> None:
    """Raises StartError unless every rank carries the operator."""
    if status.moe_layers == 0 or status.base is None:
        raise StartError(f"the engine carries PERFT's operator on no MoE layer: {status.problem}")


async def warm_up(client: EngineClient) -> None:
    """Generate one token of the base: what vLLM compiles on first use would stall every stream later.

    With log-probabilities, whose ranking vLLM may compile (seconds), unless --max-logprobs 0 allows none. Raises
    StartError if the engine refuses it.
    """
    prompt: Any = {"prompt_token_ids": [1]}
    params = SamplingParams(max_tokens=1, logprobs=None if client.model_config.max_logprobs == 0 else 1)
    try:
        async for _ in client.generate(prompt, params, f"warm-up-{uuid4().hex}"):
            pass
    except (ValueError, VLLMError) as error:
        raise StartError(f"the engine refused the server's own warm-up request: {error!r}") from error


def banner(args: Namespace, services: Services) -> str:
    """What the server prints once it answers: the names served, and a request to paste."""
    scheme = "https" if args.ssl_certfile else "http"
    host = args.host or "127.0.0.1"
    where = url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}/v1"
    if args.uds:
        where, url = args.uds, f"--unix-socket {shlex.quote(args.uds)} {scheme}://localhost/v1"
    base = services.base_names[0]
    names = [name for name, _ in services.registry.servable(Caller(None, is_admin=True))]
    shown = (": " if names else "") + ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    count = f"{len(names)} adapter" + ("s" if len(names) != 1 else "")
    key = " -H 'Authorization: Bearer KEY'" if services.keys.needs_key else ""
    return (
        f"\nPERFT is serving at {where}: base {base!r} and {count}{shown}. Try:\n\n"
        f"  curl {url}/chat/completions{key} -H 'Content-Type: application/json' \\\n"
        f'    -d \'{{"model": "{names[0] if names else base}", '
        f'"messages": [{{"role": "user", "content": "What is 27 + 58?"}}]}}\'\n'
    )
