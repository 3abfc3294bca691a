"""Owns the end of a request whose logits are NaN ("poisoned"): it fails, and none of its cached values survive.

The model runner counts the NaNs of every request's logits (VLLM_COMPUTE_NANS_IN_LOGITS, which our server sets).
Invariant: a cache block that a poisoned request wrote leaves the prefix cache before another request can match it,
and is zeroed before another request gets it: attention multiplies stale values by 0, and 0 * NaN is NaN.
"""

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from perft.engine.grammar import install_bounded_grammars
from perft.logs import escape_records

OUTPUT_INVALID = "output_invalid"
"""The stop reason of a poisoned request. vLLM ends requests with an error for other reasons too (a grammar that cannot
go on)."""


@dataclass
class _Freed:
    """A request that was freed while steps of it were in flight: the tokens of those steps, and its block ids."""

    in_flight: int = 0
    blocks: set[int] = field(default_factory=set)


class PoisonedRequests:
    """Ends poisoned requests; mixed in before one of vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._poisoned_blocks: set[int] = set()
        self._freed: dict[str, _Freed] = {}

    def schedule(self: Any, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's own schedule. The worker zeroes the poisoned blocks that are free by now before it runs the step."""
        blocks = self.kv_cache_manager.block_pool.blocks
        free = {number for number in self._poisoned_blocks if blocks[number].ref_cnt == 0}
        output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if free:
            output.new_block_ids_to_zero = sorted({*(output.new_block_ids_to_zero or ()), *free})
            self._poisoned_blocks -= free
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's own update, once the poisoned requests of the step are finished."""
        counts = model_runner_output.num_nans_in_logits or {}
        poisoned = [request_id for request_id, count in counts.items() if count]
        ended = self._end(poisoned) if poisoned else {}
        for request_id in self._freed.keys() & scheduler_output.num_scheduled_tokens.keys():
            self._freed[request_id].in_flight -= scheduler_output.num_scheduled_tokens[request_id]
            if self._freed[request_id].in_flight <= 0:
                del self._freed[request_id]
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        for client, errors in ended.items():
            outputs.setdefault(client, EngineCoreOutputs()).outputs += errors
        return outputs

    def _free_request_blocks(self: Any, request: Request) -> None:
        """vLLM's own. If steps of the request are in flight (it was aborted or preempted), its blocks are remembered
        until their results arrive, since any of them may turn out to be poisoned."""
        if request.num_in_flight_tokens > 0:
            freed = self._freed.setdefault(request.request_id, _Freed())
            freed.in_flight = request.num_in_flight_tokens
            freed.blocks |= self._blocks_of(request.request_id)
        super()._free_request_blocks(request)  # type: ignore[misc]

    def _blocks_of(self: Any, request_id: str) -> set[int]:
        """The ids of a request's cache blocks."""
        return {block for group in self.kv_cache_manager.get_block_ids(request_id) for block in group}

    def _end(self: Any, poisoned: list[str]) -> dict[int, list[EngineCoreOutput]]:
        """Finish requests with an error and take their blocks out of the prefix cache; the outputs by client index."""
        blocks: set[int] = set()
        for request_id in poisoned:
            if request_id in self._freed:
                blocks |= self._freed[request_id].blocks
            if request_id in self.requests:
                blocks |= self._blocks_of(request_id)
        ended: dict[int, list[EngineCoreOutput]] = {}
        for request in self.finish_requests(poisoned, RequestStatus.FINISHED_ERROR):
            output = EngineCoreOutput(
                request.request_id, [], finish_reason=FinishReason.ERROR, stop_reason=OUTPUT_INVALID
            )
            ended.setdefault(request.client_index, []).append(output)
        self.kv_cache_manager.evict_blocks(blocks)
        self._poisoned_blocks |= blocks
        return ended


class PerftScheduler(PoisonedRequests, Scheduler):
    """vLLM's scheduler, which ends poisoned requests."""


class PerftAsyncScheduler(PoisonedRequests, AsyncScheduler):
    """vLLM's asynchronous scheduler, which ends poisoned requests."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine (vLLM's `scheduler_cls` names this function), whose grammars are bounded, and whose
    process logs nothing of a client's as a line of its own."""
    install_bounded_grammars()
    escape_records()
    chosen = PerftAsyncScheduler if vllm_config.scheduler_config.async_scheduling else PerftScheduler
    return chosen(vllm_config, *args, **kwargs)
