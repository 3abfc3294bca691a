"""The measurements of one engine request, for each way in which vLLM's handlers ask for outputs."""

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.inference import timing
from server.inference.timing import RequestTiming
from server.metrics.counters import EventCounters

STARTED = 100.0


class Clock:
    """The `time` that RequestTiming reads."""

    def __init__(self) -> None:
        self.now = STARTED

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 5000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def new_meter(kind: str, began: float = STARTED) -> RequestTiming:
    return RequestTiming(SimpleNamespace(output_kind=SimpleNamespace(name=kind)), began)


def output(
    *parts: tuple[int, int, str | None], finished: bool = False, stamps: Any = None, prompt: int | None = 5
) -> Any:
    """One output. parts: (index, tokens, finish reason)."""
    outputs = [SimpleNamespace(index=i, token_ids=[0] * tokens, finish_reason=reason) for i, tokens, reason in parts]
    prompt_token_ids = None if prompt is None else [0] * prompt
    return SimpleNamespace(prompt_token_ids=prompt_token_ids, outputs=outputs, finished=finished, metrics=stamps)


def told(meter: RequestTiming) -> dict[str, float]:
    """What reaches the metrics: time to first token and, of the gaps between tokens, how many and their sum."""
    registry = CollectorRegistry()
    meter.report(EventCounters(registry), "poet")
    names = {"first": "time_to_first_token_seconds", "gap": "inter_token_latency_seconds"}
    return {
        f"{short}_{of}": registry.get_sample_value(f"perft_adapter_{name}_{of}", {"adapter": "poet"}) or 0.0
        for short, name in names.items()
        for of in ("count", "sum")
    }


def test_a_stream(clock: Clock) -> None:
    meter = new_meter("DELTA", began=STARTED - 1)
    for seconds, tokens, reason in ((0.5, 1, None), (0.25, 1, None), (0.5, 2, None), (0.125, 0, "stop")):
        clock.now += seconds
        assert meter.add_output(output((0, tokens, reason), finished=reason is not None)) == reason
    assert (meter.prompt_tokens, meter.generation_tokens, meter.finished) == (5, 4, True)
    assert told(meter) == {"first_count": 1, "first_sum": 1.5, "gap_count": 3, "gap_sum": 0.75}


def test_tokens_that_come_out_together_with_the_first(clock: Clock) -> None:
    meter = new_meter("DELTA")
    clock.now += 1.0
    meter.add_output(output((0, 3, "length"), finished=True))
    assert told(meter) == {"first_count": 1, "first_sum": 1.0, "gap_count": 2, "gap_sum": 0.0}


def test_a_prefix_that_is_cached_counts_as_prompt_and_the_prompt_counts_once(clock: Clock) -> None:
    meter = new_meter("DELTA")
    meter.add_output(output((0, 1, None), prompt=7))
    meter.add_output(output((0, 1, "length"), finished=True, prompt=None))
    assert (meter.prompt_tokens, meter.generation_tokens) == (7, 2)


def test_several_choices_of_a_stream(clock: Clock) -> None:
    meter = new_meter("DELTA")
    for seconds, index, reason, finished in (
        (1.0, 0, None, False), (0.5, 1, None, False), (0.5, 0, "stop", False), (1.0, 1, "length", True),
    ):  # fmt: skip
        clock.now += seconds
        assert meter.add_output(output((index, 1, reason), finished=finished)) == ("length" if finished else None)
    assert meter.generation_tokens == 4
    assert told(meter) == {"first_count": 1, "first_sum": 1.0, "gap_count": 2, "gap_sum": 1.0 + 1.5}


def test_a_stream_that_repeats_what_there_is(clock: Clock) -> None:
    meter = new_meter("CUMULATIVE")
    for tokens, reason in ((1, None), (3, None), (3, None), (4, "stop")):
        clock.now += 0.5
        meter.add_output(output((0, tokens, reason), finished=reason is not None))
    assert meter.generation_tokens == 4
    assert told(meter) == {"first_count": 1, "first_sum": 0.5, "gap_count": 3, "gap_sum": 0.5 + 1.0}


def stamps(first_s: float, between_s: float) -> Any:
    return SimpleNamespace(first_token_latency=first_s, first_token_ts=7000.0, last_token_ts=7000.0 + between_s)


def test_an_answer_at_once_has_vllms_stamps(clock: Clock) -> None:
    clock.now += 2.0  # it waited for its adapter
    meter = new_meter("FINAL_ONLY", began=STARTED)
    clock.now += 60.0
    assert meter.add_output(output((0, 11, "stop"), finished=True, stamps=stamps(0.5, 20.0))) == "stop"
    assert meter.generation_tokens == 11
    assert told(meter) == {"first_count": 1, "first_sum": 2.5, "gap_count": 10, "gap_sum": pytest.approx(20.0)}


def test_several_choices_at_once(clock: Clock) -> None:
    """The stamps are those of the choice that ended last: the longest one."""
    meter = new_meter("FINAL_ONLY")
    answer = output((0, 11, "stop"), (1, 6, "length"), (2, 1, "stop"), finished=True, stamps=stamps(0.5, 20.0))
    assert meter.add_output(answer) == "stop"
    assert meter.generation_tokens == 18
    assert told(meter) == {"first_count": 1, "first_sum": 0.5, "gap_count": 15, "gap_sum": pytest.approx(30.0)}


def test_a_single_token_has_no_gap(clock: Clock) -> None:
    meter = new_meter("FINAL_ONLY")
    meter.add_output(output((0, 1, "length"), finished=True, stamps=stamps(0.5, 0.0)))
    assert told(meter) == {"first_count": 1, "first_sum": 0.5, "gap_count": 0, "gap_sum": 0}


@pytest.mark.parametrize("kind", ["DELTA", "FINAL_ONLY", "CUMULATIVE"])
def test_what_gave_no_token_tells_nothing(kind: str, clock: Clock) -> None:
    meter = new_meter(kind)
    assert meter.add_output(output((0, 0, "abort"), finished=True, stamps=stamps(0.0, 0.0))) == "abort"
    assert meter.finished and meter.generation_tokens == 0 and not any(told(meter).values())
    never_answered = new_meter(kind)
    assert not never_answered.finished and not any(told(never_answered).values())


@pytest.mark.parametrize(
    ("prompt", "tokens"), [({"prompt_token_ids": [1, 2, 3]}, 3), ({"prompt_embeds": 0}, 0), ("text", 0)]
)
def test_whose_client_leaves_pays_for_the_prompt_that_the_engine_was_given(
    prompt: Any, tokens: int, clock: Clock
) -> None:
    meter = new_meter("FINAL_ONLY")
    meter.abandoned()
    assert meter.prompt_tokens == 0, "it still waited for its adapter"
    meter.submitted(prompt)
    assert meter.prompt_tokens == 0
    meter.abandoned()
    assert (meter.prompt_tokens, meter.generation_tokens) == (tokens, 0)


def test_what_an_output_said_of_the_prompt_goes_before_what_was_given(clock: Clock) -> None:
    meter = new_meter("DELTA")
    meter.submitted({"prompt_token_ids": [1, 2, 3]})
    meter.add_output(output((0, 1, None), prompt=7))
    meter.abandoned()
    assert meter.prompt_tokens == 7


def test_the_wait_for_a_place_counts_into_the_time_to_the_first_token(clock: Clock) -> None:
    meter = new_meter("FINAL_ONLY")
    clock.now += 2.0
    meter.submitted("a prompt")
    meter.add_output(output((0, 1, "length"), finished=True, stamps=stamps(0.5, 0.0)))
    assert told(meter)["first_sum"] == 2.5


def test_a_wait_after_the_prompt_was_tokenized_counts_once(clock: Clock) -> None:
    """vLLM's stamps begin at the prompt's arrival, so they have the wait for a free sequence already."""
    meter = new_meter("FINAL_ONLY")
    clock.now += 1.0
    prompt = {"prompt_token_ids": [1], "arrival_time": clock.time()}
    clock.now += 2.0
    meter.submitted(prompt)
    meter.add_output(output((0, 1, "length"), finished=True, stamps=stamps(2.5, 0.0)))
    assert told(meter)["first_sum"] == 3.5
