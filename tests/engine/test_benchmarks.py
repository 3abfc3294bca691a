"""The benchmarks run, on a tiny model, and what they make of their numbers is right. No number of theirs is tested."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from adapters.format.folder import read_folder
from benchmarks import page, targets
from benchmarks.common import rounds, timers, workload
from benchmarks.common.engine import ENVIRONMENT, BenchEngine, Segment
from benchmarks.common.hugging_face import HuggingFacePeer
from benchmarks.common.peft_lora import activated_parameters, equal_rank, slot_rank
from benchmarks.common.remote import remote_engine
from benchmarks.common.report import RESULTS, Report, newest
from benchmarks.common.traffic import Client, Request, Run
from benchmarks.one_process import (
    adapters,
    growth,
    memory_floor,
    neighbour,
    peers,
    plugin,
    profile_step,
    swap,
    training,
)  # fmt: skip
from benchmarks.over_http import registered, streams, vllm_bench
from perft.base_model import BaseShape
from perft.config import AdapterConfig
from server.demo.base.build import default_folder
from tests import tiny
from tests.engine.engines import environment
from tests.server.fake_server import BASE_NAMES
from tests.server.processes import free_port, launch

SEED, STEPS = 0, 2
LORA_RANK = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build("mixtral", tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def engine(base: Path) -> Iterator[BenchEngine]:
    """One for all benchmarks of this process, with PEFT LoRA too."""
    shape = workload.shape_of(base)
    rows = adapters.pool_rows_of(base, list(workload.shapes(shape))) + 200 * workload.rows_of(shape, workload.routed())
    with environment(**ENVIRONMENT):
        running = BenchEngine.start(
            base, rows, **peers.lora_options(LORA_RANK) | {"max_loras": 64, "max_cpu_loras": 64}
        )
        yield running
        running.close()


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report("test", argparse.Namespace(output=tmp_path, quick=True, base=None))


def test_every_configuration_of_adapters(engine: BenchEngine, report: Report, tmp_path: Path) -> None:
    kinds = list(workload.shapes(engine.base))
    loaded = adapters.load_kinds(engine, tmp_path, kinds)
    found = adapters.measure(engine, loaded, adapters.QUESTIONS, 1, STEPS, SEED)
    for question in adapters.QUESTIONS:
        for configuration in question.configurations:
            (segment,) = found[question.name][configuration.name]
            assert len(segment.step_s) == STEPS and len(segment.first_token_s) == configuration.requests
    adapters.tell(report, found)
    seconds = adapters.measure_prefill(engine, loaded["R"][0], 200, 1, SEED)
    adapters.tell_prefill(report, seconds, 1800)
    assert named_by_targets("adapters") <= report.comparisons.keys()


def test_a_training_step_of_every_method(base: Path, report: Report) -> None:
    methods = training.Methods(base, batch=2, tokens=8)
    found = {name: [call()] for name, call in methods.calls().items()}
    training.tell(report, found, methods.lora_label)
    assert {f"{name} / qvLoRA" for name in ("R", "E", "S", training.FORWARD)} == report.comparisons.keys()


def test_rows_that_a_layer_uses() -> None:
    config = AdapterConfig.model_validate(workload.routed())
    assert memory_floor.rows_used(config, 1) == 4 + 2 * 2 * 16
    assert memory_floor.rows_used(config, 2) == 4 + 3 * 2 * 16
    assert memory_floor.rows_used(config, 1000) == pytest.approx(4 + 4 * 2 * 16)


def test_the_floor_reads_every_row_once() -> None:
    pages_PW = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert memory_floor.read(pages_PW, np.array([3, 0, 1]), 2).sum() == pages_PW[[3, 0, 1]].sum()


def test_swap(engine: BenchEngine, report: Report, tmp_path: Path) -> None:
    folder = workload.write(tmp_path, engine.base, 1, workload.routed())[0]
    found = swap.measure(engine, {16: folder}, rounds=2)
    assert {name: len(values) for name, values in found[16].seconds.items()} == {"prepare": 2, "place": 2, "evict": 2}
    assert {name: len(values) for name, values in found[16].gaps.items()} == {"prepare": 2, "place": 2}
    inventory = swap.loading_of(engine).inventory()
    digest = read_folder(folder, engine.base).digest
    assert digest not in inventory.host and digest not in inventory.device
    swap.tell(report, found)
    assert len(report.tables) == 1


def test_growth(engine: BenchEngine, report: Report, tmp_path: Path) -> None:
    own = engine.load(workload.write(tmp_path, engine.base, 4, workload.routed(bottleneck=5)))  # nobody else's
    growth.tell_batch(report, growth.measure_batch(engine, own, (0, 1, 4), 1, STEPS, SEED))
    growth.tell_prompts(report, growth.measure_prompts(engine, own[0], (8, 32), 1, SEED))
    rows: list[int] = []
    found = growth.measure_resident(watched(engine, rows), own[0], own[1:], 4, 2, STEPS)
    assert [len(segments) for segments in found.values()] == [4, 4]
    few, many = min(rows), max(rows)
    assert rows == [few, many, many, few] * 2 and few < many
    growth.tell_resident(report, found, 4)
    assert {"4 resident / 1 resident", "batch, 64 requests, 4 adapters / base"} <= report.comparisons.keys()


def watched(engine: BenchEngine, rows: list[int]) -> Any:
    """The engine, which adds to `rows` what its pool holds in each segment."""

    class Watched:
        put_back, remove = staticmethod(engine.put_back), staticmethod(engine.remove)

        def decode(self, *arguments: Any) -> Segment:
            rows.append(engine.llm.collective_rpc("perft_status")[0]["rows_used"])
            return engine.decode(*arguments)

    return Watched()


def test_a_neighbour(engine: BenchEngine, report: Report, tmp_path: Path) -> None:
    own = engine.load(workload.write(tmp_path, engine.base, neighbour.ADAPTERS, workload.routed()))
    neighbour.tell(report, neighbour.measure(engine, own, 1, STEPS, SEED))
    assert named_by_targets("neighbour") <= report.comparisons.keys()


def test_peers(engine: BenchEngine, report: Report, base: Path, tmp_path: Path) -> None:
    peers.compare_lora(report, engine, base, tmp_path / "lora", LORA_RANK, 1, STEPS, SEED)
    folders = workload.write(tmp_path / "perft", engine.base, 2, workload.routed())
    peers.compare_hugging_face(report, engine, base, folders, engine.load(folders), 1, 3, SEED)
    assert named_by_targets("peers") <= report.comparisons.keys()


def test_hugging_face_gives_each_adapter_its_requests(base: Path, tmp_path: Path) -> None:
    folders = workload.write(tmp_path, workload.shape_of(base), 2, workload.routed())
    peer = HuggingFacePeer(base, folders)
    asked: list[Any] = []
    generate = peer._model.generate

    def record(ids: Any, **options: Any) -> Any:
        layer = peer._model.model.layers[0].mlp.perft_layer
        asked.append((ids[:, 0].tolist(), layer.down_proj.sum().item()))
        return generate(ids, **options)

    peer._model.generate = record
    peer.generate(5, 2)
    first = [workload.prompt(place, tiny.VOCABULARY)[0] for place in range(5)]
    assert [ids for ids, _ in asked] == [first[0::2], first[1::2]]
    assert asked[0][1] != asked[1][1]


def test_the_plugin(engine: BenchEngine, report: Report) -> None:
    found = plugin.measure({plugin.ON: engine, plugin.ABSENT: engine}, 1, STEPS, SEED)
    plugin.tell(report, [found, found])
    assert named_by_targets("plugin") <= report.comparisons.keys()


def test_an_engine_of_its_own_process_without_the_plugin(base: Path) -> None:
    with remote_engine(base, None, environment={"VLLM_PLUGINS": ""}) as other:
        segment = other.decode([None, None], STEPS)
        assert len(segment.step_s) == STEPS and len(segment.first_token_s) == 2
        other.ask([0], STEPS)  # an adapter, which it cannot have
        with pytest.raises(RuntimeError, match="IndexError"):
            other.answer()


def test_the_profile_finds_every_part(engine: BenchEngine, report: Report, tmp_path: Path) -> None:
    own = engine.load(workload.write(tmp_path, engine.base, profile_step.ADAPTERS, workload.routed()))
    parts = (*profile_step.PARTS, profile_step.BACK_ENDS["numba"])
    found = profile_step.measure(engine, own, parts, 1, STEPS, SEED)
    (profile,) = found[profile_step.MIX]
    assert profile.keys() == {part.name for part in parts} | {profile_step.REST}
    assert not any("delta" in part for part in found[profile_step.BASE][0])
    profile_step.tell(report, {"numba": found})


def test_streams_over_http(tmp_path: Path) -> None:
    """Against our server over the fake engine; the real one's start is tested elsewhere."""
    port = free_port()
    arguments = ["-m", "tests.server.fake_server", "--store", str(tmp_path / "store"), "--port", str(port)]
    server = launch(arguments, port, tmp_path / "log")
    try:
        server.wait_until("/health")
        client = Client(server.url, "admin-has-a-key-of-some-length")
        requests = [Request(BASE_NAMES[0], [5, 6, 7], 4) for _ in range(3)]
        for run in (client.together(requests), client.at_most(requests, 2)):
            assert run.tokens - run.merged == 12 and len(run.first_token_ms) == 3
        assert client.metric("perft_device_rows_total") == 1000
        with pytest.raises(RuntimeError, match="404"):
            client.together([Request("nobody", [5], 1)])
    finally:
        server.stop()


def test_rates_count_only_while_all_requests_decode(report: Report) -> None:
    requests = [Request("base", [1], 4)] * 2
    run = Run(requests, [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]], wall_s=5.0, client_cpu_s=0.1)
    assert run.tokens_per_second == 8 / 5
    assert run.decode_tokens_per_second == 4 / 2  # after 2.0, when the last begins, to 4.0, when the first ends
    assert run.gaps_ms == [1000.0] * 6 and run.merged == 0
    with pytest.raises(ValueError, match="more tokens"):
        _ = Run(requests, [[1.0, 2.0], [3.0, 4.0]], 4.0, 0.1).decode_tokens_per_second
    server = Mock(Client, together=Mock(return_value=run))
    found = streams.measure(server, {streams.BASE: requests, "8 adapters": requests}, 2, SEED)
    assert {name: len(runs) for name, runs in found.items()} == {streams.BASE: 2, "8 adapters": 2}
    streams.tell(report, found)
    registered.tell(
        report, "Zipf over 1000 registered adapters", {"all resident": [run], "pool for 200": [run]}, "all resident"
    )
    assert named_by_targets("http") | named_by_targets("registered") <= report.comparisons.keys()


def test_vllm_knows_the_flags_that_its_generator_gets(base: Path, tmp_path: Path) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = parser.parse_args(vllm_bench.bench_arguments("http://127.0.0.1:1", base, ["a", "b"], 8, 4, tmp_path))
    assert given.lora_modules == ["a", "b"] and given.ignore_eos and given.num_prompts == 8


def test_every_target_names_a_benchmark_and_each_is_met_or_not(tmp_path: Path) -> None:
    base_name = targets.TARGETS[0]
    latency = next(target for target in targets.TARGETS if target.is_latency)
    for value, expected in ((1.0, (True, True)), (0.9, (False, False)), (0.965, (False, True))):
        spread = rounds.spread([value]).as_json()
        comparisons = {target.comparison: spread for target in (base_name, latency)}
        result = {"question": "adapters", "date": "2026-01-01", "commit": "abc", "comparisons": comparisons}
        (tmp_path / "adapters_cpu_2026-01-01.json").write_text(json.dumps(result))
        met = tuple(
            targets.line(target, newest(target.question, target.comparison, tmp_path))[1]
            for target in (base_name, latency)
        )
        assert met == expected, value
    assert targets.line(base_name, newest("http", base_name.comparison, tmp_path)) == (
        [base_name.what, "0.97", "not measured", "", "no"],
        False,
    )


def test_the_page_says_what_the_newest_results_say() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "run python -m benchmarks.page"
    sections = {name for _, name, _ in page.SECTION.findall(text)}
    assert sections >= {target.question for target in targets.TARGETS} | {"targets", "profile_step", "vllm_bench"}


def test_a_result_becomes_its_section(tmp_path: Path) -> None:
    options = argparse.Namespace(output=tmp_path, quick=False, base=None)
    made = Report("http", options)
    made.compare("decode, 8 adapters / base", [0.96, 0.97, 0.98])
    made.table("Streams", ("requests", "ratio"), [["8 adapters", "0.97"]])
    path = made.write()
    assert path is not None and path.parent == tmp_path
    before = "<!-- bench:http:begin -->\nold\n<!-- bench:http:end -->\n<!-- bench:targets:begin --><!-- x -->\n"
    after = page.filled(before, tmp_path)
    assert "old" not in after and "| 8 adapters | 0.97 |" in after and "**Streams**" in after
    assert page.filled(after, tmp_path) == after
    assert "| 0.95 | 0.970 (0.960 to 0.980; 95 %: 0.960 to 0.980) |" in targets.table(tmp_path)


def test_a_quick_run_leaves_nothing_among_the_results() -> None:
    before = sorted(RESULTS.iterdir())
    assert Report("http", argparse.Namespace(output=None, quick=True, base=None)).write() is None
    assert sorted(RESULTS.iterdir()) == before


def test_a_round_has_every_name_once_in_many_orders() -> None:
    order = list(rounds.interleaved("abc", 20))
    by_round = [tuple(name for number, name in order if number == each) for each in range(20)]
    assert all(sorted(names) == ["a", "b", "c"] for names in by_round) and len(set(by_round)) > 3
    assert order == list(rounds.interleaved("abc", 20))


def test_ratios_are_those_of_one_round() -> None:
    times = {"base": [1.0, 2.0, 4.0], "x": [2.0, 4.0, 8.0]}
    assert rounds.ratios(times, "base") == {"x": [2.0, 2.0, 2.0]}
    assert rounds.ratios(times, "base", inverted=True) == {"x": [0.5, 0.5, 0.5]}
    found = rounds.spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.lowest, found.highest, found.count) == (3.0, 1.0, 100.0, 5)
    assert found.lowest <= found.interval_low <= found.median <= found.interval_high <= found.highest
    with pytest.raises(ValueError, match="no values"):
        rounds.spread([])


def test_a_moment_counts_for_the_innermost_timed_function(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr("benchmarks.common.timers.time.perf_counter", lambda: next(now))
    clock = timers.Timers()
    with clock.timed("outer"), clock.timed("inner"):
        pass
    assert clock.seconds == {"outer": 2.0, "inner": 3.0} and clock.calls == {"outer": 1, "inner": 1}


@pytest.mark.parametrize("popularity", workload.POPULARITIES)
def test_every_adapter_gets_a_request_and_every_request_an_adapter(popularity: str) -> None:
    for requests, count in ((32, 8), (32, 32), (8, 8), (1, 1), (64, 16)):
        chosen = workload.assigned(requests, count, popularity)
        assert len(chosen) == requests and set(chosen) == set(range(count))
    assert workload.assigned(3, 0, popularity) == [None, None, None]


def test_popularities_differ() -> None:
    shares = {name: workload.assigned(32, 8, name).count(0) for name in workload.POPULARITIES}
    assert shares["uniform"] == 4 < shares["zipf"] < shares["one hot"] == 25


def test_prompts_have_ids_of_the_vocabulary_and_begin_apart() -> None:
    found = [workload.prompt(number, tiny.VOCABULARY) for number in range(64)]
    assert all(3 <= token < tiny.VOCABULARY for prompt in found for token in prompt)
    assert len({prompt[0] for prompt in found}) == 64


def test_the_peers_rank_has_as_many_parameters(base: Path) -> None:
    import torch

    shape = BaseShape(576, 30, tuple(range(30)), 4, 2, torch.float32)  # docs/method.md's formulas, by hand
    assert activated_parameters(shape, workload.routed()) == 30 * (4 * 576 + 2 * 2 * 576 * 16)
    assert activated_parameters(shape, workload.unrouted("E", 4)) == 30 * 2 * 2 * 576 * 16
    assert activated_parameters(shape, workload.unrouted("D", 4)) == 30 * 2 * 4 * 576 * 16
    tiny_shape = workload.shape_of(base)
    per_rank = 4 * ((64 + 64) + (64 + 32))  # 4 layers; q 64 -> 64, v 64 -> 32
    rank = equal_rank(base, tiny_shape, workload.routed())
    assert abs(rank * per_rank - activated_parameters(tiny_shape, workload.routed())) <= per_rank / 2
    assert [slot_rank(each) for each in (8, 9, 20, 33)] == [8, 16, 32, 64]


def test_the_demo_is_measured_unless_another_base_is_named(tmp_path: Path) -> None:
    from benchmarks.common.report import parser

    assert parser(None, 1).parse_args([]).base is None and default_folder().name == "demo-base"
    assert parser(None, 1).parse_args(["--base", str(tmp_path)]).base == tmp_path


def named_by_targets(question: str) -> set[str]:
    """The comparisons of a benchmark that a target is about."""
    named = {target.comparison for target in targets.TARGETS if target.question == question}
    assert named
    return named
