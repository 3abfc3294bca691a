"""Speculative decoding from the prompt's own n-grams: the same answers, and a poisoned request ends alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import RequestOutput
from vllm.distributed import cleanup_dist_env_and_memory

from perft.engine.nan_counts import nans_by_request
from tests.engine.engines import TinyEngine, greedy, prompts, start
from tests.engine.test_poison import write_enormous_adapter

DRAFTS, NEW = 3, 32
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTS, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
REQUESTS = [((prompt * 40)[:80], None if i % 4 == 0 else i % 15) for i, prompt in enumerate(prompts(12, 31, longest=9))]
"""Prompts that repeat themselves, which yields drafts; the base and adapters of every variant."""


def stop(running: TinyEngine) -> None:
    running.llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculative")


@pytest.fixture(scope="module")
def without_drafts(folder: Path) -> list[list[int]]:
    """The answers to REQUESTS of an engine that does not speculate."""
    running = start("olmoe", folder, max_num_seqs=16)
    answers = tokens_of(running.generate(REQUESTS, tokens=NEW))
    stop(running)
    return answers


@pytest.fixture(scope="module")
def speculative(without_drafts: list[list[int]], folder: Path) -> Iterator[TinyEngine]:
    running = start("olmoe", folder, max_num_seqs=16, speculative_config=NGRAM)
    yield running
    stop(running)


@contextmanager
def every_step(engine: TinyEngine) -> Iterator[list[tuple[int, int]]]:
    """(drafts that were verified, drafts that were accepted) of every step meanwhile."""
    scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
    steps: list[tuple[int, int]] = []
    update = scheduler.update_from_output

    def record(scheduled: Any, output: Any) -> Any:
        drafts = scheduled.scheduled_spec_decode_tokens
        tokens = dict(zip(output.req_ids, output.sampled_token_ids, strict=False))
        steps.append((sum(map(len, drafts.values())), sum(len(tokens[request]) - 1 for request in drafts)))
        return update(scheduled, output)

    scheduler.update_from_output = record
    try:
        yield steps
    finally:
        del scheduler.update_from_output


def test_a_mixed_batch_answers_as_without_drafts_and_as_transformers(
    speculative: TinyEngine, without_drafts: list[list[int]]
) -> None:
    with every_step(speculative) as steps:
        outputs = speculative.generate(REQUESTS, tokens=NEW)
    verified, accepted = (sum(numbers) for numbers in zip(*steps, strict=True))
    assert verified > len(REQUESTS) and accepted > 0, "nothing was speculated"
    assert tokens_of(outputs) == without_drafts
    for (_, case), output in zip(REQUESTS, outputs, strict=True):
        speculative.check(case, output)


def test_a_poisoned_request_among_drafts_ends_alone(
    speculative: TinyEngine, without_drafts: list[list[int]], tmp_path: Path
) -> None:
    """It comes while the others verify drafts: its row of logits is not the one of its place in the batch."""
    engine = speculative.llm.llm_engine
    enormous = write_enormous_adapter(speculative, tmp_path)
    for i, (prompt, case) in enumerate(REQUESTS):
        request = speculative.request(case)
        engine.add_request(f"other-{i}", {"prompt_token_ids": prompt}, greedy(NEW), lora_request=request)
    ended: dict[str, RequestOutput] = {}

    def step() -> None:
        ended.update({output.request_id: output for output in engine.step() if output.finished})

    with every_step(speculative) as steps:
        while not steps or steps[-1][0] < DRAFTS:
            step()
        engine.add_request("poisoned", {"prompt_token_ids": [5, 6, 7]}, greedy(NEW), lora_request=enormous)
        step()
        assert steps[-1][0] >= DRAFTS, "no drafts were verified beside it"
    while engine.has_unfinished_requests():
        step()
    poisoned = ended.pop("poisoned")
    assert poisoned.outputs[0].finish_reason == "error" and list(poisoned.outputs[0].token_ids) == []
    assert tokens_of([ended[f"other-{i}"] for i in range(len(REQUESTS))]) == without_drafts


@pytest.mark.parametrize(
    ("counts", "drafts", "expected"),
    [
        ([0, 0, 0, 7], {"a": [1, 1]}, {"a": 0, "b": 7}),
        ([0, 0, 7, 0], {"a": [1, 1]}, {"a": 7, "b": 0}),
        ([7, 0], {}, {"a": 7, "b": 0}),
        ([0, 1, 2], {"b": [1]}, {"a": 0, "b": 3}),
    ],
)
def test_nans_are_counted_by_request(counts: list[int], drafts: dict[str, list[int]], expected: dict[str, int]) -> None:
    assert nans_by_request(counts, ["a", "b"], drafts) == expected
