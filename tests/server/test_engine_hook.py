"""What happens around an engine request: its lease on the device, its end, its measurements; over a real registry."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from perft.engine.scheduler import OUTPUT_INVALID
from server.app.plugin import _as_vllm_error
from server.auth.keys import Caller
from server.auth.rate_limits import RateLimits
from server.errors import RateLimitedError, ServerError
from server.inference.engine_hook import EngineHook
from server.inference.request_context import CURRENT, RequestContext, RequestFacts
from server.metrics.counters import EventCounters
from server.registry.version import Version
from tests.server.desk import ADMIN, ALICE, ROWS, Desk, Quotas, on_a_loop, opened
from tests.server.fakes import FakeEngine, ready_status

PROMPT = [1, 2, 3]
Step = Callable[[], Awaitable[None]]


def output(*tokens: int, reason: str | None = None, stop_reason: str | None = None, index: int = 0, **more: Any) -> Any:
    """One output of the engine, of one choice; finished where there is a reason."""
    part = SimpleNamespace(index=index, token_ids=list(tokens), finish_reason=reason, stop_reason=stop_reason)
    values = {"prompt_token_ids": PROMPT, "outputs": [part], "finished": reason is not None, "metrics": None}
    return SimpleNamespace(**values | more)


@dataclass
class Client:
    """vLLM's client: yields its script, an exception or a coroutine function in it is raised or awaited."""

    engine: FakeEngine
    script: list[Any] = field(default_factory=lambda: [output(7), output(8, reason="stop")])
    asked: list[dict[str, Any]] = field(default_factory=list)
    closed: int = 0

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        self.asked.append({"prompt": prompt, "request_id": request_id, "lora_request": lora_request, **options})
        adapter = None if lora_request is None else lora_request.adapter
        try:
            async with self.engine.request(adapter):
                for step in self.script:
                    if isinstance(step, Exception):
                        raise step
                    if callable(step):
                        await step()
                    else:
                        yield step
        finally:
            self.closed += 1


@dataclass
class Generating(Client):
    """vLLM's client with an engine that generates one token every `every` seconds for each request, until `most`;
    an abort ends a request with what it generated. Outputs are as the request's parameters ask."""

    every: float = 0.1
    most: int = 1000
    is_deaf: bool = False
    generated: dict[str, int] = field(default_factory=dict)
    aborts: dict[str, asyncio.Event] = field(default_factory=dict)
    seeds: list[int | None] = field(default_factory=list)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **options: Any
    ) -> AsyncGenerator[Any, None]:
        assert sampling_params.n == 1
        self.asked.append({"request_id": request_id})
        self.seeds.append(sampling_params.seed)
        aborted = self.aborts[request_id] = asyncio.Event()
        self.generated[request_id] = told = 0
        kind = sampling_params.output_kind.name
        try:
            async with self.engine.request(None if lora_request is None else lora_request.adapter):
                while not aborted.is_set() and self.generated[request_id] < self.most:
                    await asyncio.sleep(self.every)
                    self.generated[request_id] += 1
                    if kind != "FINAL_ONLY" and not aborted.is_set() and self.generated[request_id] < self.most:
                        yield output(*range(told, self.generated[request_id]))
                        told = self.generated[request_id] if kind == "DELTA" else 0
                tokens = range(told, self.generated[request_id])
                yield output(*tokens, reason="abort" if aborted.is_set() else "length")
        finally:
            self.closed += 1

    async def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids if not self.is_deaf else ():
            self.aborts[request_id].set()


@dataclass
class Around:
    """EngineHook around a Client, and a way to ask it."""

    desk: Desk
    client: Any
    inference: EngineHook
    registry: CollectorRegistry
    limits: RateLimits
    n: int = 1
    seed: int | None = None

    def context(self, model: str | None, caller: Caller = ALICE) -> RequestContext:
        version = None if model is None else self.desk.found(model)
        return RequestContext(caller, version, RequestFacts(), time.monotonic())

    async def ask(
        self, context: RequestContext | None, kind: str = "DELTA", version: Version | None = None, **more: Any
    ) -> Any:
        """All outputs of one engine request. version: in the place of the context's own."""
        return [each async for each in self.generate(context, kind, version, **more)]

    def generate(
        self, context: RequestContext | None, kind: str = "DELTA", version: Version | None = None, **more: Any
    ) -> AsyncGenerator[Any, None]:
        CURRENT.set(context)
        version = version or (None if context is None else context.version)
        request = None if version is None else SimpleNamespace(lora_name=version.id, adapter=version.ref)
        params: Any = SimpleNamespace(output_kind=SimpleNamespace(name=kind), n=self.n, seed=self.seed)
        prompt = {"prompt_token_ids": PROMPT}
        stream: Any = self.client.generate(prompt, params, "client-chose-this", lora_request=request, **more)
        return stream  # type: ignore[no-any-return]

    def counted(self, adapter: str, reason: str) -> float:
        labels = {"adapter": adapter, "finish_reason": reason}
        return self.registry.get_sample_value("perft_adapter_requests_total", labels) or 0

    def measured(self, name: str, adapter: str) -> float:
        return self.registry.get_sample_value(name, {"adapter": adapter}) or 0

    def leases(self, model: str) -> int:
        running: int = self.desk.scheduler._leases.running.get(self.desk.ref(model).engine_id, 0)
        return running

    def check_nothing_runs(self) -> None:
        registry, scheduler = self.desk.registry, self.desk.scheduler
        assert not any(version.running for name in registry.names() for version in registry.versions(name))
        assert not scheduler._leases.running and not scheduler._waiters and self.inference.base_running == 0
        assert self.client.closed == len(self.client.asked)


@asynccontextmanager
async def surroundings(
    folder: Path, engine: FakeEngine | None = None, load_timeout_s: float = 10.0, **generating: Any
) -> AsyncIterator[Around]:
    engine = engine or FakeEngine()
    async with opened(folder, engine, Quotas(drain_timeout_s=0.01)) as desk:
        for seed, name in enumerate(("poet", "clerk")):
            await desk.upload(name, seed)
        registry, limits = CollectorRegistry(), RateLimits(None, 1000, clock=lambda: 0.0)
        client: Any = Generating(engine, **generating) if generating else Client(engine)
        metrics = EventCounters(registry, base_name="base")
        inference = EngineHook(desk.registry, desk.scheduler, metrics, limits, load_timeout_s, _as_vllm_error)
        inference.install(client)
        around = Around(desk, client, inference, registry, limits)
        yield around
        around.check_nothing_runs()


@on_a_loop
async def test_outputs_pass_and_options_too(folder: Path) -> None:
    async with surroundings(folder) as around:
        for model in ("poet", None):
            assert await around.ask(around.context(model), priority=3) == around.client.script
            asked = around.client.asked[-1]
            assert (asked["prompt"], asked["priority"]) == ({"prompt_token_ids": PROMPT}, 3)
        poets, bases = around.client.asked
        assert poets["lora_request"].lora_name == "poet@1" and bases["lora_request"] is None
        assert poets["request_id"] != bases["request_id"], "two clients may choose one id"


@on_a_loop
async def test_the_place_is_held_exactly_while_the_engines_request_lives(folder: Path) -> None:
    async with surroundings(folder) as around:
        context, scheduler, seen = around.context("poet"), around.desk.scheduler, []

        async def see() -> None:
            assert context.version is not None
            seen.append((around.leases("poet@1"), len(context.version.running)))

        async with context.first_lease:
            await context.acquire(scheduler, 1.0)
            await see()
            around.client.script = [see, output(1), see, output(2, reason="stop"), see]
            await around.ask(context)
            await see()
        assert seen == [(1, 0), (1, 1), (1, 1), (1, 1), (0, 0)]


@on_a_loop
async def test_a_request_with_several_prompts_holds_a_place_for_each(folder: Path) -> None:
    async with surroundings(folder) as around:
        context = around.context("poet")
        together = asyncio.Barrier(3)

        async def meet() -> None:
            await together.wait()
            assert around.leases("poet@1") == 3
            await together.wait()

        around.client.script = [output(1), meet, output(2, reason="stop")]
        await asyncio.gather(*(around.ask(context) for _ in range(3)))
        assert context.facts.prompt_tokens == 9 and context.facts.generation_tokens == 6


@on_a_loop
async def test_who_goes_away_ends_the_engines_request(folder: Path) -> None:
    async with surroundings(folder) as around:
        around.client.script = [output(7), asyncio.Event().wait]
        stream = around.generate(around.context("poet"))
        await anext(stream)
        assert around.leases("poet@1") == 1 and around.client.closed == 0
        await stream.aclose()
        assert around.client.closed == 1 and around.counted("poet", "abort") == 1
        around.check_nothing_runs()
        forever = asyncio.Event()
        around.client.script = [output(1), forever.wait]
        for model, name in (("clerk", "clerk"), (None, "base")):
            asked = asyncio.create_task(around.ask(around.context(model)))
            await around.desk.until(lambda: around.client.closed == len(around.client.asked) - 1)
            await asyncio.sleep(0.01)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
            assert around.counted(name, "abort") == 1
            around.check_nothing_runs()


@on_a_loop
async def test_who_goes_away_after_the_end_aborts_nothing(folder: Path) -> None:
    async with surroundings(folder) as around:
        stream = around.generate(around.context("poet"))
        for _ in range(2):
            await anext(stream)
        await stream.aclose()
        assert (around.counted("poet", "stop"), around.counted("poet", "abort")) == (1, 0)


@on_a_loop
async def test_an_output_that_is_no_number_is_the_adapters_fault(folder: Path) -> None:
    async with surroundings(folder) as around:
        for script in (
            [output(1), output(reason="error", stop_reason=OUTPUT_INVALID)],
            [output(reason="error", stop_reason=OUTPUT_INVALID, index=1, finished=False), output(1, reason="stop")],
        ):
            around.client.script, context = script, around.context("poet")
            with pytest.raises(GracefulHTTPError) as ended:
                await around.ask(context)
            assert ended.value.http_status is HTTPStatus.INTERNAL_SERVER_ERROR
            assert context.failure is not None and context.failure.code == "adapter_output_invalid"
            assert "poet@1" in context.failure.message
            around.check_nothing_runs()
        assert around.counted("poet", "adapter_output_invalid") == 2 and around.counted("poet", "error") == 0


@on_a_loop
async def test_another_error_of_the_engine_is_not(folder: Path) -> None:
    async with surroundings(folder) as around:
        for model, name, stop_reason in (("poet", "poet", None), (None, "base", OUTPUT_INVALID)):
            context = around.context(model)
            around.client.script = [output(1), output(reason="error", stop_reason=stop_reason)]
            assert len(await around.ask(context)) == 2
            assert context.failure is None and around.counted(name, "error") == 1


@on_a_loop
async def test_an_exception_of_the_engine_is_an_error_and_no_abort(folder: Path) -> None:
    async with surroundings(folder) as around:
        for model, name in (("poet", "poet"), (None, "base")):
            context = around.context(model)
            around.client.script = [output(1), RuntimeError("engine dead")]
            with pytest.raises(RuntimeError, match="engine dead"):
                await around.ask(context)
            assert context.failure is None
            assert (around.counted(name, "error"), around.counted(name, "abort")) == (1, 0)


@on_a_loop
async def test_what_the_engine_refuses_is_its_clients_mistake_and_costs_nothing(folder: Path) -> None:
    """An alert advises rolling an adapter back whose requests end in "error"."""
    async with surroundings(folder) as around:
        for error in (VLLMValidationError("found a bad logit_bias"), ValueError("found a bad grammar")):
            context = around.context("poet")
            around.client.script = [error]
            with pytest.raises(type(error)):
                await around.ask(context)
            assert context.facts.prompt_tokens == 0
        assert (around.counted("poet", "invalid_request"), around.counted("poet", "error")) == (2, 0)
        around.client.script = [output(1), ValueError("no client's mistake any more")]
        with pytest.raises(ValueError, match="no client's"):
            await around.ask(around.context("poet"))
        assert (around.counted("poet", "invalid_request"), around.counted("poet", "error")) == (2, 1)


@on_a_loop
async def test_a_deleted_version_ends_its_requests_with_that_word(folder: Path) -> None:
    async with surroundings(folder) as around:
        aborted = asyncio.Event()
        around.desk.on_abort = lambda request_id: aborted.set()
        around.client.script = [output(1), aborted.wait, output(reason="abort")]
        context = around.context("poet")
        asked = asyncio.create_task(around.ask(context))
        await around.desk.until(lambda: bool(around.client.asked))
        await around.desk.service.delete("poet", None, ADMIN)
        with pytest.raises(GracefulHTTPError) as ended:
            await asked
        assert ended.value.http_status is HTTPStatus.GONE
        assert context.failure is not None and context.failure.code == "adapter_deleted"
        assert around.desk.aborted == [around.client.asked[0]["request_id"]], "the id that the engine knows"
        assert around.counted("poet", "adapter_deleted") == 1
        await around.desk.until_gone("poet")


@on_a_loop
async def test_an_abort_that_nobody_asked_for_is_the_engines_end(folder: Path) -> None:
    """As when its process is told to end: for the client it must not look like the end of the answer."""
    async with surroundings(folder) as around:
        around.client.script = [output(1), output(reason="abort")]
        context = around.context("poet")
        with pytest.raises(GracefulHTTPError):
            await around.ask(context)
        assert context.failure is not None and context.failure.code == "engine_unavailable"
        assert around.counted("poet", "engine_unavailable") == 1


@on_a_loop
async def test_a_version_that_was_deleted_starts_nothing_any_more(folder: Path) -> None:
    async with surroundings(folder) as around:
        context, version = around.context("poet"), around.desk.found("poet")
        lease = around.desk.registry.lease(version)
        with lease:  # vLLM takes long over the prompt
            await around.desk.service.delete("poet", None, ADMIN)
            await around.desk.until(lambda: version.is_deleted)
            with pytest.raises(GracefulHTTPError):
                await around.ask(context)
            assert context.failure is not None and context.failure.code == "adapter_deleted"
        await around.desk.until_gone("poet")
        with pytest.raises(GracefulHTTPError):
            await around.ask(context)
        assert context.failure.code == "model_not_found" and not around.client.asked


@on_a_loop
async def test_an_adapter_that_cannot_be_loaded_is_told_as_such(folder: Path) -> None:
    engine = FakeEngine()
    engine.failures["place", "poet@1"] = 1
    async with surroundings(folder, engine) as around:
        context = around.context("poet")
        with pytest.raises(GracefulHTTPError) as ended:
            await around.ask(context)
        assert ended.value.http_status is HTTPStatus.SERVICE_UNAVAILABLE and not around.client.asked
        assert around.counted("poet", "adapter_unavailable") == 1
        assert isinstance(context.failure, ServerError) and context.failure.code == "adapter_unavailable"


@on_a_loop
async def test_an_engine_request_waits_for_its_place(folder: Path) -> None:
    """Not every engine request waits in AdapterRouting: a second prompt may come after the first ended."""
    async with surroundings(folder, FakeEngine(ready_status(rows_total=ROWS))) as around:
        async with around.desk.request("clerk"):
            asked = asyncio.create_task(around.ask(around.context("poet")))
            await around.desk.until(lambda: around.desk.scheduler.requests_waiting(around.desk.ref("poet@1")) == 1)
            assert not around.client.asked
        assert len(await asked) == 2


@on_a_loop
async def test_tokens_are_charged_and_logged(folder: Path) -> None:
    async with surroundings(folder) as around:
        around.client.script = [output(*range(300)), output(*range(400), reason="length")]
        context = around.context("poet")
        await around.ask(context)
        assert (context.facts.prompt_tokens, context.facts.generation_tokens) == (3, 700)
        around.limits.check("alice")
        await around.ask(around.context(None))
        with pytest.raises(RateLimitedError, match="tokens per minute"):
            around.limits.check("alice")
        for _ in range(3):
            await around.ask(around.context("poet", ADMIN))
        around.limits.check("admin")
        assert around.measured("perft_adapter_prompt_tokens_total", "poet") == 12
        assert around.measured("perft_adapter_generation_tokens_total", "poet") == 2800
        assert around.measured("perft_adapter_generation_tokens_total", "base") == 700
        assert around.counted("poet", "length") == 4


@on_a_loop
async def test_what_ends_early_is_charged_for_what_it_used(folder: Path) -> None:
    async with surroundings(folder) as around:
        around.client.script = [output(*range(1000))]
        stream = around.generate(around.context("poet"))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(RateLimitedError, match="tokens per minute"):
            around.limits.check("alice")


@on_a_loop
async def test_who_leaves_before_the_only_output_pays_for_the_prompt(folder: Path) -> None:
    async with surroundings(folder) as around:
        around.client.script, context = [asyncio.Event().wait], around.context("poet")
        asked = asyncio.create_task(around.ask(context, "FINAL_ONLY"))
        await around.desk.until(lambda: bool(around.client.asked))
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        assert context.facts.prompt_tokens == len(PROMPT) and around.counted("poet", "abort") == 1
        assert around.measured("perft_adapter_prompt_tokens_total", "poet") == len(PROMPT)


@on_a_loop
async def test_who_leaves_before_the_engine_had_the_request_pays_nothing(folder: Path) -> None:
    async with surroundings(folder, FakeEngine(ready_status(rows_total=ROWS))) as around:
        async with around.desk.request("clerk"):
            context = around.context("poet")
            asked = asyncio.create_task(around.ask(context))
            await around.desk.until(lambda: around.desk.scheduler.requests_waiting(around.desk.ref("poet@1")) == 1)
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        assert context.facts.prompt_tokens == 0 and not around.client.asked


@on_a_loop
async def test_an_engine_request_of_nobodys_exchange(folder: Path) -> None:
    """vLLM's own warm-up goes the same way."""
    async with surroundings(folder) as around:
        assert len(await around.ask(None)) == 2
        assert len(await around.ask(None, version=around.desk.found("poet"))) == 2
        assert around.counted("base", "stop") == 1 and around.counted("poet", "stop") == 1


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("kind", ["DELTA", "CUMULATIVE", "FINAL_ONLY"])
def test_who_leaves_pays_for_what_was_generated(tmp_path: Path, kind: str, n: int) -> None:
    @on_a_loop
    async def scenario(folder: Path) -> None:
        async with surroundings(folder, every=0.1) as around:
            for model, name in (("poet", "poet"), (None, "base")):
                around.n, context = n, around.context(model)
                asked = asyncio.create_task(around.ask(context, kind))
                await asyncio.sleep(1.55)
                asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
                around.check_nothing_runs()
                generated = sum(around.client.generated.values())
                assert context.facts.generation_tokens == generated >= 15 * n
                assert context.facts.prompt_tokens == len(PROMPT)
                assert around.measured("perft_adapter_generation_tokens_total", name) == generated
                assert around.counted(name, "abort") == 1
                around.client.generated.clear()
            charged = 2 * (len(PROMPT) + generated)
            assert around.limits._empty_until["alice"] == pytest.approx(-60 + charged * 60 / 1000)
            assert not around.limits._meters and not around.limits._running

    scenario(tmp_path)


@pytest.mark.parametrize("kind", ["DELTA", "FINAL_ONLY"])
def test_what_runs_counts_for_the_next_request(tmp_path: Path, kind: str) -> None:
    """Requests that started before any was charged do not get around the limit."""

    @on_a_loop
    async def scenario(folder: Path) -> None:
        async with surroundings(folder, every=0.1) as around:
            generated = around.client.generated
            own = SimpleNamespace(
                request_states=SimpleNamespace(
                    get=lambda i: SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: generated[i]))
                ),
                external_req_ids=SimpleNamespace(get=lambda i, _: (i,)),
            )
            around.client.output_processor = own
            around.n = 10
            asked = [asyncio.create_task(around.ask(around.context("poet"), kind)) for _ in range(5)]
            await asyncio.sleep(1.05)
            around.limits.check("alice")
            await asyncio.sleep(1.0)
            with pytest.raises(RateLimitedError, match="tokens per minute"):
                around.limits.check("alice")
            context = around.context(None)
            with pytest.raises(GracefulHTTPError):
                await around.ask(context, kind)
            assert context.failure is not None and context.failure.code == "rate_limited"
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    scenario(tmp_path)


@on_a_loop
async def test_an_engine_that_hears_no_abort_holds_nobody_for_ever(folder: Path) -> None:
    async with surroundings(folder, every=0.1, is_deaf=True) as around:
        asked = asyncio.create_task(around.ask(around.context("poet")))
        await asyncio.sleep(1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        around.check_nothing_runs()
        assert around.counted("poet", "abort") == 1


@pytest.mark.parametrize("kind", ["DELTA", "FINAL_ONLY"])
def test_n_choices_are_sequences_of_their_own(tmp_path: Path, kind: str) -> None:
    @on_a_loop
    async def scenario(folder: Path) -> None:
        async with surroundings(folder, every=0.1, most=5) as around:
            around.n, around.seed = 4, 7
            context = around.context("poet")
            outputs = await around.ask(context, kind)
            assert [each.finished for each in outputs] == [False] * (len(outputs) - 1) + [True]
            tokens: dict[int, int] = {}
            for each in outputs:
                for choice in each.outputs:
                    tokens[choice.index] = tokens.get(choice.index, 0) + len(choice.token_ids)
            assert tokens == dict.fromkeys(range(4), 5) and around.client.seeds == [7, 8, 9, 10]
            if kind == "FINAL_ONLY":
                assert len(outputs) == 1 and [choice.index for choice in outputs[0].outputs] == [0, 1, 2, 3]
            assert context.facts.prompt_tokens == len(PROMPT) and context.facts.generation_tokens == 20
            assert around.counted("poet", "length") == 1

    scenario(tmp_path)


@pytest.mark.parametrize("name", ["poet", None])
def test_several_choices_run_as_one_request(tmp_path: Path, name: str | None) -> None:
    @on_a_loop
    async def scenario(folder: Path) -> None:
        async with surroundings(folder, every=0.1, most=5) as around:
            around.n = 4
            version = around.desk.registry.active("poet")
            assert version is not None
            asked = asyncio.create_task(around.ask(around.context(name)))
            await asyncio.sleep(0.25)
            found = around.inference.base_running, version.requests_running
            assert found == ((1, 0) if name is None else (0, 1)), "the API and the metrics count requests"
            await asked
            assert (around.inference.base_running, version.requests_running) == (0, 0)

    scenario(tmp_path)


@on_a_loop
async def test_the_sequences_of_a_key_are_counted(folder: Path) -> None:
    async with surroundings(folder, every=0.1, most=5) as around:
        around.limits._max_requests = 8
        around.limits.enter("alice")
        around.n, context = 8, around.context("poet")
        running = asyncio.create_task(around.ask(context))
        await asyncio.sleep(0.2)
        assert around.limits.running("alice") == 8
        other = around.context(None)
        around.n = 1
        with pytest.raises(RateLimitedError):
            around.limits.enter("alice")
        await running
        assert around.limits.running("alice") == 1
        around.n = 9
        with pytest.raises(GracefulHTTPError):
            await around.ask(other)
        assert other.failure is not None and other.failure.code == "rate_limited" and not other.sequences
        assert around.limits.running("alice") == 1
        around.limits.leave("alice")


@on_a_loop
async def test_many_choices_that_nobody_reads_end_at_once_when_their_reader_leaves(folder: Path) -> None:
    """More of them wait to be read than are kept: none may wait for ever, or its tokens are charged to nobody."""
    async with surroundings(folder, every=0.01) as around:
        around.n, context = 40, around.context("poet")
        stream = around.generate(context)
        await anext(stream)
        await asyncio.sleep(0.5)
        began = asyncio.get_running_loop().time()
        await stream.aclose()
        assert asyncio.get_running_loop().time() - began < 1
        around.check_nothing_runs()
        assert context.facts.generation_tokens == sum(around.client.generated.values())


@pytest.mark.parametrize("n", [1, 4])
def test_what_the_engine_refuses_is_charged_to_nobody(tmp_path: Path, n: int) -> None:
    @on_a_loop
    async def scenario(folder: Path) -> None:
        async with surroundings(folder) as around:
            around.n, around.client.script = n, [VLLMValidationError("found a bad logit_bias")]
            context = around.context("poet")
            with pytest.raises(VLLMValidationError):
                await around.ask(context)
            assert context.facts.prompt_tokens == 0 and not around.limits._empty_until

    scenario(tmp_path)
