"""Owns what happens once the engine is up and before the server answers: checks and a warm-up request."""

from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMError
from vllm.sampling_params import SamplingParams

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
