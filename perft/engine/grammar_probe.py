"""Owns trying a structured-output spec before it reaches the engine, and vLLM's validation where it would do so itself.

`make_probe` is loaded in a process of its own, where every try can be killed. Invariant: what passes a try has been
validated, compiled and used as vLLM would, at half the engine's budget; and once `install_validation` ran, no native
code converts a spec in that process.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from itertools import islice
from types import SimpleNamespace
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.structured_output.backend_types import StructuredOutputOptions
from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

from perft.engine.grammar import EACH_S, FIRST_S, BoundedGrammar, BoundedXgrammarBackend, TokenBudget

MAX_COMPILED_BYTES = 32 * 1024**2
"""Of one compiled grammar; the engine's cache (VLLM_XGRAMMAR_CACHE_MB) holds several."""
TRIED_TOKENS = 64
TRIED_PARTS = 32
"""Patterns, and schemas of a tag, that are also tried alone: a walk through the whole may not come to them."""
_PARTS = {
    "pattern": StructuredOutputOptions.REGEX,
    "schema": StructuredOutputOptions.JSON,
    "json_schema": StructuredOutputOptions.JSON,
}
_WHERE = re.compile(r"\[[0-9:]+\] [^ ]+:[0-9]+: ")
"""How xgrammar begins a message: the time and its own source file."""


def install_validation(check: Callable[[StructuredOutputsParams], None]) -> None:
    """In the API process: vLLM's validation becomes `check`, which calls no native code.

    vLLM converts every spec on the event loop, structural tags even while it reads the body. Specs are tried before
    they reach the engine, so what it would find is found there. `check` raises VLLMValidationError.
    """
    from vllm.parser import abstract_parser
    from vllm.v1.structured_output import backend_xgrammar
    from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

    def validate(sampling_params: SamplingParams) -> None:
        structured = sampling_params.structured_outputs
        if structured is None:
            return
        check(structured)
        if structured.choice:  # a copy: requests of several prompts share what they were given
            structured = sampling_params.structured_outputs = copy(structured)
            structured.grammar, structured.choice = choice_as_grammar(structured.choice or []), None

    def supports(structured_outputs: StructuredOutputsParams) -> bool:
        """Lark would be converted there and then; with False vLLM leaves the tool calls unconstrained instead."""
        return not grammar_is_likely_lark(structured_outputs.grammar or "")

    backend_xgrammar.validate_xgrammar_grammar = validate
    abstract_parser._xgrammar_supports = supports


def pack_setup(vllm_config: Any) -> bytes:
    """What `make_probe` needs of the served model."""
    packed: bytes = cloudpickle.dumps((vllm_config.model_config, vllm_config.structured_outputs_config))
    return packed


def make_probe(setup: bytes) -> Callable[[dict[str, Any], list[int]], object]:
    """Load tokenizer and back end. Returns what tries one spec as API process and engine would use it.

    It takes {kind: value} and the stop token ids, and returns the compiled grammar. Raises ValueError with the reason.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config, structured_config = cloudpickle.loads(setup)
    tokenizer = cached_tokenizer_from_config(model_config)
    # The three attributes that the back end reads.
    config: Any = SimpleNamespace(
        model_config=model_config, structured_outputs_config=structured_config, speculative_config=None
    )
    backend = BoundedXgrammarBackend(config, tokenizer=tokenizer, vocab_size=model_config.get_vocab_size())
    walks = _Walks(backend)

    def probe(fields: dict[str, Any], stop_token_ids: list[int]) -> object:
        try:
            params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
            params._validate_structured_outputs(model_config, structured_config, tokenizer)
            return _compile(backend, walks, params, stop_token_ids)
        except (ValueError, VLLMValidationError, RuntimeError, UnicodeError, TypeError, KeyError) as error:
            raise ValueError(_reason(error, fields)) from None

    return probe


def _compile(
    backend: BoundedXgrammarBackend, walks: "_Walks", params: SamplingParams, stop_token_ids: list[int]
) -> BoundedGrammar:
    from vllm.v1.structured_output.request import get_structured_output_key

    kind, spec = get_structured_output_key(params.structured_outputs)
    grammar: BoundedGrammar = backend.compile_grammar(kind, spec, stop_token_ids=set(stop_token_ids) or None)
    if grammar.ctx.memory_size_bytes > MAX_COMPILED_BYTES:
        raise ValueError(f"it compiles to {grammar.ctx.memory_size_bytes} bytes, expected at most {MAX_COMPILED_BYTES}")
    walks.run(grammar)
    if kind in (StructuredOutputOptions.JSON, StructuredOutputOptions.STRUCTURAL_TAG):
        for part_kind, part in islice(_parts(spec), TRIED_PARTS):
            if part_kind is StructuredOutputOptions.JSON and has_xgrammar_unsupported_json_features(json.loads(part)):
                # vLLM looks for them in a schema alone, not in a tag
                raise ValueError(f"a schema of the tag contains features not supported by xgrammar ({_lacking(part)})")
            with suppress(RuntimeError):  # as a part of the spec it was converted
                walks.run(backend.compile_grammar(part_kind, part))
    return grammar


def _parts(spec: str) -> Iterator[tuple[StructuredOutputOptions, str]]:
    """The patterns in a schema or structural tag, and the tag's schemas, each once."""
    waiting: list[Any] = [json.loads(spec)]
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            for keyword, kind in _PARTS.items():
                part = node.get(keyword)
                text = part if isinstance(part, str) else json.dumps(part)
                is_one = isinstance(part, dict if kind is StructuredOutputOptions.JSON else str)
                if is_one and text not in seen:
                    seen.add(text)
                    yield kind, text
        waiting += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


class _Walks:
    """Generates a few tokens of a grammar, as an engine would."""

    def __init__(self, backend: BoundedXgrammarBackend) -> None:
        self._backend = backend
        self._mask = backend.allocate_token_bitmask(1)
        any_object = backend.compile_grammar(StructuredOutputOptions.JSON_OBJECT, "")  # in the cache of every fork
        self._lengths = np.array([len(token) for token in any_object.ctx.tokenizer_info.decoded_vocab])

    def run(self, grammar: BoundedGrammar) -> None:
        """Raises ValueError if tokens cost too much, or none is allowed."""
        generator = np.random.default_rng(0)
        self._run(grammar, generator.choice)
        grammar.reset()
        self._run(grammar, lambda allowed: allowed[self._lengths[allowed].argmax()])  # soon past what is counted

    def _run(self, grammar: BoundedGrammar, choose: Callable[[Any], Any]) -> None:
        grammar.budget = TokenBudget(FIRST_S / 2, EACH_S / 2)
        stops = np.array(grammar.matcher.stop_token_ids, dtype=np.int64)
        for number in range(TRIED_TOKENS):
            grammar.fill_bitmask(self._mask, 0)
            if grammar.is_ended:
                raise ValueError("it is too ambiguous: choosing its tokens takes too long")
            bits = np.unpackbits(self._mask[0].numpy().view(np.uint8), bitorder="little")[: self._backend.vocab_size]
            allowed = np.nonzero(bits)[0]
            if not len(allowed):
                raise ValueError("it allows no text" if number == 0 else "it leads to where no text can follow or end")
            allowed = allowed[~np.isin(allowed, stops)]
            if not len(allowed) or not grammar.accept_tokens("", [int(choose(allowed))]) or grammar.is_terminated():
                return


def _reason(error: Exception, fields: dict[str, Any]) -> str:
    """What the caller learns: the cause where vLLM only says that there is one; the features that are missing."""
    text = str(error)
    if error.__cause__ is not None and str(error.__cause__) not in text:
        text = f"{text} {error.__cause__}"
    if "features not supported" in text and "json" in fields:
        text += f" ({_lacking(fields['json'])})"
    return _WHERE.sub("", text).strip()


_FEATURES = ("allOf", "contains", "format", "maxContains", "maxLength", "minContains", "minLength", "multipleOf",
             "pattern", "patternProperties", "propertyNames", "unevaluatedProperties", "uniqueItems")  # fmt: skip


def _lacking(schema: Any) -> str:
    """The keywords of the innermost schema that xgrammar does not support."""
    is_unsupported = has_xgrammar_unsupported_json_features
    node = json.loads(schema) if isinstance(schema, str) else schema
    while True:
        nested = [each for value in node.values() for each in (value if isinstance(value, list) else [value])]
        inner = next((each for each in nested if isinstance(each, dict) and is_unsupported(each)), None)
        if inner is None:
            return "found together: " + ", ".join(keyword for keyword in _FEATURES if keyword in node)
        node = inner
