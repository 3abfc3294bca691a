"""Owns the requests the server asks itself before it opens: what vLLM compiles on first use stops every stream then."""

from typing import Any
from uuid import uuid4

from vllm.engine.protocol import EngineClient
from vllm.sampling_params import SamplingParams


async def warm_up(client: EngineClient) -> None:
    """One token of the base with log-probabilities, whose ranking vLLM compiles (3 s on a calm pair of cores)."""
    prompt: Any = {"prompt_token_ids": [1]}
    async for _ in client.generate(prompt, SamplingParams(max_tokens=1, logprobs=1), f"warm-up-{uuid4().hex}"):
        pass
