"""Engine tokens = Hugging Face model with our modules, for every variant; alone, mixed, never by another's prefix."""

import pytest
import torch

from tests.engine.engines import TinyEngine, prompts


def test_every_variant_answers_as_transformers_does(engine: TinyEngine) -> None:
    requests = [(prompt, case) for case in range(len(engine.cases)) for prompt in prompts(2, seed=case)]
    changed = 0
    base = engine.generate([(prompt, None) for prompt, _ in requests])
    for (_, case), output, plain in zip(requests, engine.generate(requests), base, strict=True):
        engine.check(case, output)
        changed += output.outputs[0].token_ids != plain.outputs[0].token_ids
    assert changed == len(requests), "adapters whose weights are large enough must change the answers"


def test_base_answers_as_transformers_does(engine: TinyEngine) -> None:
    for output in engine.generate([(prompt, None) for prompt in prompts(4)]):
        engine.check(None, output)


def test_forty_requests_over_ten_adapters_and_the_base(engine: TinyEngine) -> None:
    choice = [None, 0, 1, 3, 4, 7, 9, 11, 12, 13, 14]  # every variant; bottlenecks 3, 5, 64; all or some layers
    requests = [(prompt, choice[i % len(choice)]) for i, prompt in enumerate(prompts(40, seed=7, longest=200))]
    for (_, case), output in zip(requests, engine.generate(requests), strict=True):
        engine.check(case, output)


def test_a_prefix_cached_under_one_adapter_is_never_used_by_another(engine: TinyEngine) -> None:
    prompt = torch.arange(0, 200).remainder(120).add(3).tolist()
    seen: set[int | None] = set()
    for case in (0, 2, None, 0, 2, None, 2, 0):
        (output,) = engine.generate([(prompt, case)], tokens=8)
        engine.check(case, output)
        assert bool(output.num_cached_tokens) == (case in seen), "its own prefix is found again, no other's is"
        seen.add(case)


@pytest.mark.parametrize("case", [0, 3])
def test_a_request_in_a_mixed_batch_answers_as_it_does_alone(engine: TinyEngine, case: int) -> None:
    prompt = prompts(1, seed=13)[0]
    (alone,) = engine.generate([(prompt, case)])
    mixed = engine.generate([(prompt, case), *((p, i % 5) for i, p in enumerate(prompts(9, seed=14)))])[0]
    engine.check(case, alone)
    engine.check(case, mixed)
