"""What a structured-output grammar may cost in the engine, and trying one before it gets there."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xgrammar
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1 import structured_output
from vllm.v1.structured_output import backend_xgrammar
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

from perft.engine import grammar as grammar_module
from perft.engine.grammar import (
    BoundedGrammar,
    BoundedXgrammarBackend,
    GrammarThread,
    OverrunError,
    TimedThread,
    TokenBudget,
    install_bounded_grammars,
)
from perft.engine.grammar_probe import install_validation, make_probe, pack_setup
from server.errors import InvalidRequestError
from server.structured_outputs.bounds import check_bounds
from server.structured_outputs.checker import SpecChecker
from server.structured_outputs.process import Compiler, CompilerProcess
from server.structured_outputs.spec import Spec
from tests.abuse.specs import HOSTILE, ORDINARY, tagged
from tests.server import characters

MAX_BYTES = 64 * 1024
REGEX = StructuredOutputOptions.REGEX


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a VllmConfig has of these."""
    model = characters.build_model(tmp_path_factory.mktemp("characters"))
    config = AsyncEngineArgs(model=str(model), dtype="float32").create_model_config()
    structured = StructuredOutputsConfig(backend="xgrammar")
    return SimpleNamespace(model_config=config, structured_outputs_config=structured, speculative_config=None)


@pytest.fixture(scope="module")
def backend(served: Any) -> BoundedXgrammarBackend:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(served.model_config)
    return BoundedXgrammarBackend(served, tokenizer=tokenizer, vocab_size=served.model_config.get_vocab_size())


def spin(seconds: float) -> Callable[[], str]:
    def work() -> str:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return "done"

    return work


def test_work_within_its_time_is_done_and_charged() -> None:
    thread, budget = GrammarThread(), TokenBudget()
    assert thread.call(spin(0.02), budget) == "done" and budget.spent_s >= 0.02
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0, budget)
    assert thread.call(lambda: 7, budget) == 7


def test_work_that_ends_just_after_its_time_is_an_overrun_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is gone then, and with it the clock that it is charged by; an OSError would end the engine."""
    leave, is_over = TimedThread._leave, threading.Event()

    def work() -> None:
        while not is_over.is_set():
            pass

    def leave_and_end(thread: TimedThread) -> None:
        leave(thread)
        is_over.set()
        while Path(f"/proc/self/task/{thread._thread.native_id}").exists():
            time.sleep(0.001)

    monkeypatch.setattr(TimedThread, "_leave", leave_and_end)
    thread, budget = GrammarThread(), TokenBudget()
    with pytest.raises(OverrunError):
        thread.call(work, budget)
    assert budget.spent_s >= grammar_module.ONCE_S
    assert thread.call(lambda: 7, budget) == 7


def test_time_that_a_thread_waits_is_not_its_own() -> None:
    """A busy machine ends no grammar."""
    assert GrammarThread().call(lambda: time.sleep(3 * grammar_module.ONCE_S) or 1, TokenBudget()) == 1


def test_work_that_takes_too_long_is_left_alone_and_the_next_goes_on() -> None:
    thread = GrammarThread()
    with pytest.raises(OverrunError):
        thread.call(spin(60), TokenBudget())
    assert thread.call(lambda: "next", TokenBudget()) == "next"


def test_after_many_overruns_the_rest_are_hurried() -> None:
    thread = GrammarThread(clock=lambda: 0.0)
    for _ in range(20):
        if thread._overruns_s >= grammar_module.OVERRUNS_S:
            break
        with pytest.raises(OverrunError):
            thread.call(spin(5), TokenBudget())
    budget = TokenBudget()
    with pytest.raises(OverrunError):
        thread.call(spin(5), budget)
    assert grammar_module.HURRIED_S <= budget.spent_s < 3
    thread._clock = lambda: 1e6
    thread.call(lambda: None, budget)
    assert thread._overruns_s == 0, "forgiven in time"


def test_a_bounded_grammar_is_vllms_own(backend: BoundedXgrammarBackend) -> None:
    plain = XgrammarBackend(backend.vllm_config, tokenizer=backend.tokenizer, vocab_size=backend.vocab_size)
    arguments = (StructuredOutputOptions.JSON, '{"enum": ["yes", "no"]}', {2})
    grammars = [each.compile_grammar(*arguments) for each in (plain, backend)]
    assert [type(each) for each in grammars] == [XgrammarGrammar, BoundedGrammar]
    masks = [each.allocate_token_bitmask(2) for each in (plain, backend)]
    for character in '"yes"':
        for each, mask in zip(grammars, masks, strict=True):
            each.fill_bitmask(mask, 1)
        assert torch.equal(*masks)
        token = backend.tokenizer.convert_tokens_to_ids(character)
        assert all(each.accept_tokens("r", [token]) for each in grammars)
    assert not grammars[1].is_ended


def test_a_grammar_that_turns_expensive_ends_what_uses_it_and_nothing_else(backend: BoundedXgrammarBackend) -> None:
    costly, twin = (backend.compile_grammar(REGEX, "a{5}(.?){200}") for _ in range(2))
    other = backend.compile_grammar(REGEX, "a{50}b")
    mask = backend.allocate_token_bitmask(2)
    token = backend.tokenizer.convert_tokens_to_ids("a")

    for number in range(8):
        if number == 5:
            costly.matcher = SimpleNamespace(fill_next_token_bitmask=lambda *_: spin(60)())
        costly.fill_bitmask(mask, 0)
        other.fill_bitmask(mask, 1)
        assert other.accept_tokens("other", [token])
        if not costly.accept_tokens("costly", [token]):
            break
    assert number == 5 and costly.is_ended and twin.is_ended and not other.is_ended
    assert (mask[0] == -1).all() and not (mask[1] == -1).all()
    assert not twin.accept_tokens("twin", [token])
    assert not backend.compile_grammar(REGEX, "a{6}(.?){200}").is_ended


def test_a_grammar_whose_tokens_cost_too_much_together_ends(backend: BoundedXgrammarBackend) -> None:
    costly, twin = (backend.compile_grammar(REGEX, "a{500}") for _ in range(2))
    costly.budget = TokenBudget(0.1, 0.001)
    costly.matcher = SimpleNamespace(accept_token=lambda _: spin(0.02)(), is_terminated=lambda: False)
    accepted = [costly.accept_tokens("r", [5]) for _ in range(20)]
    assert accepted[0] and not accepted[-1] and not twin.is_ended


def test_the_engine_builds_our_back_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structured_output, "XgrammarBackend", XgrammarBackend)
    install_bounded_grammars()
    assert structured_output.XgrammarBackend is BoundedXgrammarBackend


def test_the_api_process_converts_nothing(monkeypatch: pytest.MonkeyPatch, served: Any) -> None:
    """vLLM's validation as its input processor calls it, with a converter that would end the test."""
    from vllm.parser import abstract_parser

    monkeypatch.setattr(backend_xgrammar, "validate_xgrammar_grammar", None)
    monkeypatch.setattr(abstract_parser, "_xgrammar_supports", None)
    for name in ("from_regex", "from_ebnf", "from_json_schema", "from_lark", "from_structural_tag"):
        monkeypatch.setattr(xgrammar.Grammar, name, None)

    def check(structured: StructuredOutputsParams) -> None:
        if structured.regex == "bad":
            raise VLLMValidationError("no")

    install_validation(check)
    for fields in ({"regex": "a"}, {"json": {"type": "object"}}, {"grammar": "root ::= root"}, {"json_object": True},
                   {"structural_tag": "{}"}):  # fmt: skip
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
        params._validate_structured_outputs(served.model_config, served.structured_outputs_config, object())
        assert params.structured_outputs._backend == "xgrammar"
    given = StructuredOutputsParams(choice=["yes", 'n"o'])
    params = SamplingParams(structured_outputs=given)
    params._validate_structured_outputs(served.model_config, served.structured_outputs_config, object())
    assert params.structured_outputs.grammar == 'root ::= "yes" | "n\\"o"' and given.choice == ["yes", 'n"o']
    with pytest.raises(VLLMValidationError):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="bad"))
        params._validate_structured_outputs(served.model_config, served.structured_outputs_config, object())
    assert not abstract_parser._xgrammar_supports(StructuredOutputsParams(grammar='start: "a"'))
    assert abstract_parser._xgrammar_supports(StructuredOutputsParams(grammar='root ::= "a"'))


def test_a_try_passes_or_says_why(served: Any) -> None:
    probe = make_probe(pack_setup(served))
    for name, spec in ORDINARY.items():
        assert isinstance(probe({spec.kind: spec.value}, [2]), BoundedGrammar), name
    for fields, reason in [
        ({"json": {"type": "array", "items": [{}]}}, "^Failed to transform json .*: items must be a boolean or an obj"),
        ({"json": {"$ref": "#"}}, "allows no text"),
        ({"grammar": "root ::= root"}, "allows no text"),
        ({"grammar": 'root ::= "a" b\nb ::= b'}, "no text can follow"),
        ({"regex": "é"}, "allows no text"),
        ({"json": HOSTILE["what xgrammar lacks"].spec.value}, r"not supported by xgrammar.*patternProperties"),
        ({"json": {"properties": {"a": {"type": "integer", "multipleOf": 2}}}}, r"found together: multipleOf"),
        ({"regex": "(a"}, "parenthesis"),
        ({"structural_tag": tagged(HOSTILE["what xgrammar lacks"].spec.value)}, "of the tag.*patternProperties"),
        ({"structural_tag": tagged({"$ref": "#"})}, "allows no text"),
        ({"structural_tag": '{"structures": [{}], "triggers": []}'}, "structural tag"),
        ({"regex": "a", "choice": ["b"]}, "one kind"),
    ]:
        with pytest.raises(ValueError, match=reason):
            probe(fields, [])


async def refused(checked: Awaitable[None]) -> bool:
    try:
        await checked
    except InvalidRequestError:
        return True
    return False


def test_every_hostile_spec_is_refused_and_the_ordinary_go_on(served: Any) -> None:
    """With the real process; each hostile one tried although the bounds refuse it, so that a crash is one of a fork."""

    async def run() -> None:
        process = CompilerProcess(Compiler("perft.engine.grammar_probe:make_probe", pack_setup(served)), 256 * 1024**2)
        process.start()
        checker = SpecChecker(process, MAX_BYTES, 2.0)
        try:
            await process.compile(Spec("json_object", True), 60)
            first = process.pid
            for name, hostile in HOSTILE.items():
                if hostile.is_out_of_bounds and len(str(hostile.spec.value)) < 300_000:
                    await process.compile(hostile.spec, 0.5)  # the check, which follows, does not come so far
                structured = SimpleNamespace(**{hostile.spec.kind: hostile.spec.value})
                params = SimpleNamespace(structured_outputs=structured, all_stop_token_ids={2})
                assert await refused(checker.check(params, "mallory")), name
                if not hostile.is_out_of_bounds:
                    check_bounds(hostile.spec, MAX_BYTES)
                assert process.pid == first, name
            for name, spec in ORDINARY.items():
                structured = SimpleNamespace(**{spec.kind: spec.value})
                await checker.check(SimpleNamespace(structured_outputs=structured, all_stop_token_ids={2}), "alice")
                assert process.pid == first, name
        finally:
            await process.close()

    asyncio.run(run())
