"""Owns the requests the server asks itself before it opens: what vLLM compiles on first use stops every stream then."""

from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.exceptions import VLLMError
from vllm.sampling_params import SamplingParams

from server.errors import StartError


async def warm_up(client: EngineClient) -> None:
    """One token of the base with log-probabilities, whose ranking vLLM compiles (3 s on a calm pair of cores).

    Without them where --max-logprobs 0 allows none. Raises StartError if the engine refuses it.
    """
    prompt: Any = {"prompt_token_ids": [1]}
    params = SamplingParams(max_tokens=1, logprobs=None if client.model_config.max_logprobs == 0 else 1)
    try:
        async for _ in client.generate(prompt, params, f"warm-up-{uuid4().hex}"):
            pass
    except (ValueError, VLLMError) as error:
        raise StartError(f"the engine refused the server's own first request: {error!r}") from error
