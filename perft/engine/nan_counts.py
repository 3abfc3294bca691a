"""Owns how many NaNs a request's logits have: at what cost they are counted, and whose they are.

vLLM's V1 model runner counts NaNs by row and takes row i for request i. With drafts (speculative decoding) a request
has a row per draft and one more. Invariant: a count is what vLLM's own function finds, and belongs to the request whose
rows were counted, in whatever step.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import torch
from vllm.v1.worker import gpu_model_runner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

Bookkeeping = Callable[..., tuple[Any, ...]]
Count = Callable[[torch.Tensor], torch.Tensor]


def nans_by_request(
    counts: Sequence[int], request_ids: Sequence[str], drafts: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """The NaNs of each request out of those of each row of logits.

    counts: one per row, the rows of a request together, in the order of `request_ids`. drafts: those that a request
    had in the step; none for a request that is absent.
    """
    found: dict[str, int] = {}
    start = 0
    for request_id in request_ids:
        stop = start + 1 + len(drafts.get(request_id, ()))
        found[request_id] = sum(counts[start:stop])
        start = stop
    return found


def counting_seldom(count: Count) -> Count:
    """vLLM's count of the NaNs in each row of logits [T, V], which on a CPU is only made where there can be one.

    A sum is finite only if all of its parts are, and takes a quarter of the time.
    """

    @wraps(count)
    def count_where_needed(logits_TV: torch.Tensor) -> torch.Tensor:
        if logits_TV.device.type == "cpu" and bool(logits_TV.sum(dim=-1).isfinite().all()):
            return torch.zeros(len(logits_TV), dtype=torch.int32)
        return count(logits_TV)

    count_where_needed.counts_seldom = True  # type: ignore[attr-defined]
    return count_where_needed


def install_nan_counts() -> None:
    """Have vLLM's model runners count seldom, and by request in the steps that verify drafts; once per process."""
    if not hasattr(gpu_model_runner.count_nans_per_row, "counts_seldom"):
        gpu_model_runner.count_nans_per_row = counting_seldom(gpu_model_runner.count_nans_per_row)
    if not hasattr(GPUModelRunner._bookkeeping_sync, "counts_by_request"):
        GPUModelRunner._bookkeeping_sync = _counting_by_request(GPUModelRunner._bookkeeping_sync)


def _counting_by_request(bookkeeping: Bookkeeping) -> Bookkeeping:
    """vLLM's bookkeeping after a step, with the first of its results put right."""

    def count(
        self: GPUModelRunner, scheduler_output: Any, sampler_output: Any, logits: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        request_ids = list(self.input_batch.req_ids)
        by_row, *others = bookkeeping(self, scheduler_output, sampler_output, logits, *args, **kwargs)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        if not by_row or not drafts:
            return by_row, *others
        counts = gpu_model_runner.count_nans_per_row(logits).tolist()
        return nans_by_request(counts, request_ids, drafts), *others

    count.counts_by_request = True  # type: ignore[attr-defined]
    return count
