"""Structured-output specs: their bounds, the compile process and its ends, and whose turn it is."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from server.errors import EngineUnavailableError, InvalidRequestError, RateLimitedError
from server.structured_outputs import checker as checker_module
from server.structured_outputs import process as process_module
from server.structured_outputs.bounds import check_bounds
from server.structured_outputs.checker import SpecChecker
from server.structured_outputs.key_slots import KeySlots
from server.structured_outputs.patterns import pattern_size
from server.structured_outputs.process import Compiler, CompilerProcess, _environment
from server.structured_outputs.spec import Spec
from server.structured_outputs.wire import Verdict
from tests.abuse.specs import HOSTILE, ORDINARY

MAX_BYTES = 64 * 1024
PATIENCE_S = 120.0
MEMORY = 256 * 1024**2


def on_a_real_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), PATIENCE_S))

    return run


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def compiling(job: str = "make") -> AsyncIterator[CompilerProcess]:
    """The real process, with a job of tests/server/compile_jobs.py."""
    process = CompilerProcess(Compiler(f"tests.server.compile_jobs:{job}"), MEMORY)
    process.start()
    try:
        yield process
    finally:
        await process.close()


def said(text: str) -> Spec:
    return Spec("regex", text)


def parameters(structured: Any) -> Any:
    return SimpleNamespace(structured_outputs=structured, all_stop_token_ids=set())


@pytest.mark.parametrize("name", ORDINARY)
def test_what_clients_really_send_is_within_the_bounds(name: str) -> None:
    check_bounds(ORDINARY[name], MAX_BYTES)


@pytest.mark.parametrize("name", [name for name, hostile in HOSTILE.items() if hostile.is_out_of_bounds])
def test_what_is_too_large_is_refused_before_anything_reads_it(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(InvalidRequestError) as refused:
        check_bounds(HOSTILE[name].spec, MAX_BYTES)
    assert len(refused.value.message) < 300
    assert time.thread_time() - began < 1.0, "it takes time linear in the spec"


@pytest.mark.parametrize("depth", [10, 63, 64, 65, 100, 10_000, 1_000_000])
@pytest.mark.parametrize("as_text", [False, True])
def test_depth_is_counted_without_recursion(depth: int, as_text: bool) -> None:
    value: Any = {}
    for _ in range(0 if as_text else depth - 1):
        value = {"items": value}
    text = '{"items":' * (depth - 1) + "{}" + "}" * (depth - 1)
    spec = Spec("json", text if as_text else value)
    if depth <= 64:
        check_bounds(spec, MAX_BYTES)
    else:
        with pytest.raises(InvalidRequestError, match=r"64 levels deep|too large"):
            check_bounds(spec, MAX_BYTES)
    while isinstance(value, dict) and value:  # or its own end recurses
        value = value.pop("items")


@pytest.mark.parametrize(
    ("text", "depth", "size"),
    [
        ("", 0, 0), ("abc", 0, 3), ("a|b", 0, 2), ("a{3}", 0, 3), ("abc{100}", 0, 102), ("(ab){3,5}", 1, 10),
        ("((a{2}){3}){4,}", 2, 24), ("(a{1,1000}){1,1000}", 1, 1_000_000), (r"\(\[", 0, 2), ("[(]", 0, 1),
        ("[]()]{4}", 0, 4), (r"\p{Lu}{3}", 0, 3), ("((((", 4, 0), ("))))", 0, 0), ("(a){99999999999999}", 1, 10**12),
        ("(((a{99999}){99999}){99999}){99999}", 3, 10**12), ("a{,7}", 0, 7), ("a{x}", 0, 4),
    ],
)  # fmt: skip
def test_a_regex_is_measured_with_its_repetitions_written_out(text: str, depth: int, size: int) -> None:
    found = pattern_size(text)
    assert (found.depth, found.size) == (depth, size)


def test_a_grammar_is_measured_with_its_quotes() -> None:
    assert pattern_size('root ::= "((" (a{3} | "x"){2}', is_grammar=True).depth == 1
    assert pattern_size('root ::= "ab"{1000}', is_grammar=True).size >= 2000
    assert pattern_size("start: x~2..500", is_grammar=True).size >= 500


@pytest.mark.parametrize("piece", ["[", "(", "{", "\\", "\\p{", '"', "a{1", "~", "[[", "\\[", '"\\', "[\\", "/", '\n"'])
@pytest.mark.parametrize("is_grammar", [False, True])
def test_measuring_takes_linear_time(piece: str, is_grammar: bool) -> None:
    began = time.thread_time()
    pattern_size(piece * (MAX_BYTES // len(piece)), is_grammar)
    assert time.thread_time() - began < 2.0


def test_half_a_surrogate_pair_is_refused() -> None:
    for spec in (Spec("regex", "\ud800"), Spec("json", {"const": "\udfff"}), Spec("choice", ["a", "\ud83d"])):
        with pytest.raises(InvalidRequestError, match="surrogate"):
            check_bounds(spec, MAX_BYTES)


@on_a_real_loop
async def test_a_compile_ends_as_it_ends_and_the_next_one_works() -> None:
    async with compiling() as process:
        for text, cpu_s, outcome in [
            ("crash", 5, "crashed"),
            ("refuse 7", 5, "refused"),
            ("spin 60", 0.1, "too_slow"),
            (f"take {4 * MEMORY}", 5, "too_large"),
            (f"take {MEMORY // 2}", 5, "too_large"),
            ("take 1000", 5, "passed"),
            ("recurse 20000", 5, "crashed"),
        ]:
            found = await process.compile(said(text), cpu_s)
            assert found.outcome == outcome or (text.startswith("recurse") and found.outcome == "refused"), (
                text,
                found,
            )
            first = process.pid
            assert (await process.compile(said("fine"), 5)).outcome == "passed"
            assert process.pid == first, "the process itself goes on"
        assert (await process.compile(said("refuse 7"), 5)).reason == "found 7"


@on_a_real_loop
async def test_a_compile_without_cpu_time_is_given_up_as_stalled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "MIN_WALL_S", 0.2)
    monkeypatch.setattr(process_module, "WALL_PER_CPU", 0.1)
    async with compiling() as process:
        assert (await process.compile(said("sleep 600"), 1)).outcome == "stalled"
        checker = SpecChecker(process, MAX_BYTES, 1)
        with pytest.raises(EngineUnavailableError, match="too busy"):
            await checker.check(parameters(SimpleNamespace(regex="sleep 600")), None)
        assert not checker._verdicts, "it may pass another time"


@on_a_real_loop
async def test_a_compile_ends_with_its_client() -> None:
    async with compiling() as process:
        await process.compile(said("fine"), 5)
        assert process.pid is not None
        child = psutil.Process(process.pid)
        asked = asyncio.create_task(process.compile(said("sleep 600"), 5))
        await until(lambda: len(child.children()) == 1)
        asked.cancel()
        await until(lambda: not child.children())
        assert not process._asked


@on_a_real_loop
async def test_compiles_run_beside_each_other() -> None:
    async with compiling() as process:
        slow = asyncio.create_task(process.compile(said("sleep 600"), 5))
        assert (await process.compile(said("fine"), 5)).outcome == "passed"
        assert not slow.done()
        slow.cancel()


@on_a_real_loop
async def test_a_process_that_ends_is_started_again_and_the_request_tried_once_more() -> None:
    async with compiling() as process:
        await process.compile(said("fine"), 5)
        first = process.pid
        asked = asyncio.create_task(process.compile(said("sleep 1"), 5))
        await until(lambda: bool(process._asked))
        assert first is not None
        os.kill(first, 9)
        assert (await asked).outcome == "passed" and process.pid != first


@on_a_real_loop
async def test_a_spec_that_ends_the_process_twice_is_not_tried_a_third_time() -> None:
    async with compiling() as process:
        with pytest.raises(EngineUnavailableError, match="ended"):
            await process.compile(said("leave"), 5)
        assert (await process.compile(said("fine"), 5)).outcome == "passed"


@on_a_real_loop
async def test_a_process_that_does_not_start_lets_nothing_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "START_TIMEOUT_S", 1.0)
    async with compiling("broken") as process:
        with pytest.raises(EngineUnavailableError, match="does not start"):
            await process.compile(said("fine"), 5)


STARTER = """
import asyncio, sys
from server.structured_outputs.process import Compiler, CompilerProcess
from server.structured_outputs.spec import Spec

async def main():
    process = CompilerProcess(Compiler("tests.server.compile_jobs:make"), 2**28)
    process.start()
    await process.compile(Spec("regex", "fine"), 5)
    asyncio.create_task(process.compile(Spec("regex", "sleep 600"), 5))
    print(process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_the_process_and_its_compiles_end_with_the_server() -> None:
    """Killed, so that it can end nothing itself."""
    root = Path(__file__).parents[2]
    server = subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, cwd=root, text=True)
    assert server.stdout is not None
    child = psutil.Process(int(server.stdout.readline()))
    end = time.monotonic() + PATIENCE_S
    while not (forks := child.children()):
        assert time.monotonic() < end
    server.kill()
    server.wait()
    _, alive = psutil.wait_procs([child, *forks], timeout=PATIENCE_S)
    assert not alive


class Scripted:
    """A compiler whose compiles end when the test says so. running: the specs under way."""

    def __init__(self, costs: dict[str, float] | None = None) -> None:
        self.costs = costs or {}
        self.running: dict[str, asyncio.Event] = {}
        self.asked: list[tuple[str, float]] = []
        self.left: list[str] = []

    async def close(self) -> None:
        pass

    async def compile(self, spec: Spec, cpu_s: float) -> Verdict:
        name = spec.value
        self.asked.append((name, cpu_s))
        cost = self.costs.get(name)
        if cost is not None:
            return Verdict("too_slow" if cost > cpu_s else "passed", cpu_s=min(cost, cpu_s))
        event = self.running[name] = asyncio.Event()
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.left.append(name)
            raise
        finally:
            del self.running[name]
        return Verdict("passed", cpu_s=0.001)


def asking(checker: SpecChecker, name: str, label: str | None) -> asyncio.Task[None]:
    return asyncio.create_task(checker.check(parameters(SimpleNamespace(regex=name)), label))


@on_a_real_loop
async def test_one_key_holds_one_slot_and_others_go_first() -> None:
    compiler = Scripted()
    checker = SpecChecker(compiler, MAX_BYTES, 1.0)
    greedy = [asking(checker, f"m{number}", "mallory") for number in range(10)]
    await until(lambda: bool(compiler.running))
    others = [asking(checker, name, name) for name in ("alice", "bob")]
    await until(lambda: len(compiler.running) == 2)
    assert set(compiler.running) == {"m0", "alice"}
    compiler.running["m0"].set()
    await until(lambda: "bob" in compiler.running)
    assert set(compiler.running) == {"alice", "bob"}, "mallory had her turn"
    for task in (*greedy, *others):
        task.cancel()
    await asyncio.gather(*greedy, *others, return_exceptions=True)
    await until(lambda: not compiler.running)
    assert not checker._flights and not checker._short._waiting and not checker._short._holders


@on_a_real_loop
async def test_an_expensive_spec_waits_in_a_lane_of_its_own() -> None:
    compiler = Scripted({"slow": 0.7, "slower": 0.9, "cheap": 0.0, "endless": 99.0})
    checker = SpecChecker(compiler, MAX_BYTES, 1.0)
    await asking(checker, "slow", "mallory")
    assert compiler.asked == [("slow", checker_module.SHORT_S), ("slow", 1.0)]
    waiting = asking(checker, "slower", "eve")
    for number in range(3):
        await asking(checker, "cheap", f"key{number}")
    assert not waiting.done(), "the long lane rests after an expensive one"
    await waiting
    with pytest.raises(InvalidRequestError, match="structured_compile_s"):
        await asking(checker, "endless", "mallory")


@on_a_real_loop
async def test_verdicts_are_kept_but_for_expensive_ones_that_passed() -> None:
    compiler = Scripted({"slow": 0.21, "cheap": 0.0, "endless": 99.0})
    checker = SpecChecker(compiler, MAX_BYTES, 0.3)
    for _ in range(2):
        await asking(checker, "cheap", "a")
        await asking(checker, "slow", "a")
        with pytest.raises(InvalidRequestError):
            await asking(checker, "endless", "b")
    counted = {name: sum(each == name for each, _ in compiler.asked) for name in compiler.costs}
    assert counted == {"cheap": 1, "slow": 4, "endless": 2}


@on_a_real_loop
async def test_equal_specs_of_one_key_are_compiled_once_and_as_long_as_anyone_waits() -> None:
    compiler = Scripted()
    checker = SpecChecker(compiler, MAX_BYTES, 1.0)
    first, second = asking(checker, "same", "a"), asking(checker, "same", "a")
    await until(lambda: bool(compiler.running))
    first.cancel()
    await asyncio.sleep(0.05)
    assert compiler.running and not compiler.left
    compiler.running["same"].set()
    await second
    assert len(compiler.asked) == 1
    alone = asking(checker, "alone", "a")
    await until(lambda: bool(compiler.running))
    alone.cancel()
    await until(lambda: compiler.left == ["alone"])


@on_a_real_loop
async def test_a_keys_own_queue_is_bounded() -> None:
    checker = SpecChecker(Scripted(), MAX_BYTES, 1.0)
    tasks = [asking(checker, f"{number}", "mallory") for number in range(checker_module.MAX_WAITING + 2)]
    done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [type(task.exception()) for task in done] == [RateLimitedError]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@on_a_real_loop
async def test_turns_survive_any_order_of_leaving() -> None:
    slots = KeySlots(1, 100)
    order: list[str] = []

    async def take(name: str) -> None:
        async with slots.hold(name[0]):
            order.append(name)
            await asyncio.sleep(0)

    tasks = {name: asyncio.create_task(take(name)) for name in ("a1", "a2", "a3", "b1", "b2", "c1")}
    await asyncio.sleep(0)
    for name in ("a2", "b1"):
        tasks[name].cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert order == ["a1", "b2", "c1", "a3"]
    assert slots._free == 1 and not slots._waiting and not slots._holders


@on_a_real_loop
async def test_a_request_without_a_spec_asks_nobody() -> None:
    compiler = Scripted()
    await SpecChecker(compiler, MAX_BYTES, 1.0).check(parameters(None), "a")
    assert not compiler.asked


@on_a_real_loop
async def test_a_spec_out_of_bounds_is_not_compiled() -> None:
    compiler = Scripted()
    checker = SpecChecker(compiler, MAX_BYTES, 1.0)
    with pytest.raises(InvalidRequestError, match="parentheses"):
        await checker.check(parameters(SimpleNamespace(json={"pattern": "(" * 70})), "a")
    assert not compiler.asked


@pytest.mark.parametrize(
    "given", [None, '{"backend": "auto"}', '{"backend": "xgrammar", "disable_any_whitespace": true}']
)
def test_the_back_end_is_pinned_for_every_request(given: str | None, tmp_path: Path) -> None:
    """With "auto" the first request would choose for everybody."""
    from server.hosting.arguments import parse_arguments, prepare_arguments

    more = [] if given is None else ["--structured-outputs-config", given]
    args = parse_arguments(["model", "--adapter-store", str(tmp_path / "store"), *more])
    prepare_arguments(args)
    assert args.structured_outputs_config.backend == "xgrammar"
    assert args.structured_outputs_config.disable_any_whitespace == ("any" in (given or ""))


@pytest.mark.parametrize("name", ["outlines", "guidance", "lm-format-enforcer"])
def test_another_back_end_is_refused_at_start(name: str, tmp_path: Path) -> None:
    from server.errors import StartError
    from server.hosting.arguments import parse_arguments, prepare_arguments

    config = json.dumps({"backend": name})
    args = parse_arguments(["model", "--adapter-store", str(tmp_path), "--structured-outputs-config", config])
    with pytest.raises(StartError, match=f"found backend '{name}', expected 'xgrammar'"):
        prepare_arguments(args)


def test_the_process_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_ADMIN_KEY", "a-key-of-some-length")
    found = _environment()
    assert "PATH" in found and not any(name.startswith("PERFT_") for name in found)
