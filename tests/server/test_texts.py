"""Text is bounded before it is tokenized, and long texts are tokenized one by one, beside short ones."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from server.bodies.texts import LENGTHS, LONG_TEXT, PIECE, TextTurns
from server.errors import ContextLengthError
from tests.abuse.texts import REQUESTS
from tests.server import tiny_server
from tests.server.fake_server import settings_of
from tests.server.fakes import FakeEngine
from tests.server.test_error_shapes import GENERATING, SELECTING, Asker, name_of, refused
from tests.server.vllm_app import LENGTH, running

LENGTH_OF_MODEL = LONG_TEXT
CHARACTERS = 4
"""Of the longest token of `Tokenizer`."""


class Tokenizer:
    """Every character is a token. at_call: called with each text."""

    max_chars_per_token = CHARACTERS

    def __init__(self) -> None:
        self.texts: list[int] = []
        self.at_call: Callable[[str], Any] = lambda text: None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        self.at_call(text)
        self.texts.append(len(text))
        return {"input_ids": range(len(text))}


class Renderer:
    """What TextTurns knows of vLLM's. short: texts that vLLM's own thread got."""

    def __init__(self) -> None:
        self.tokenizer, self.short = Tokenizer(), list[int]()

    def _tokenize_prompt(self, prompt: Any, params: Any) -> int:
        return len(self.tokenizer(prompt["prompt"])["input_ids"])

    async def _tokenize_prompt_async(self, prompt: Any, params: Any) -> int:
        self.short.append(len(prompt["prompt"]))
        return len(prompt["prompt"])


def wrapped(max_model_len: int = LENGTH_OF_MODEL, characters: int = CHARACTERS) -> Any:
    renderer = Renderer()
    renderer.tokenizer.max_chars_per_token = characters
    TextTurns(max_model_len, lambda error: error).install(renderer)
    return renderer


def ask(renderer: Any, length: int) -> Any:
    return renderer._tokenize_prompt_async({"prompt": "x" * length}, None)


def test_a_short_text_goes_on_in_vllms_own_thread() -> None:
    renderer = wrapped()
    assert asyncio.run(ask(renderer, LONG_TEXT)) == LONG_TEXT
    assert renderer.short == [LONG_TEXT] and not renderer.tokenizer.texts


def test_a_long_text_is_tokenized_elsewhere() -> None:
    renderer = wrapped()
    assert asyncio.run(ask(renderer, LONG_TEXT + 1)) == LONG_TEXT + 1
    assert not renderer.short and renderer.tokenizer.texts == [LONG_TEXT + 1]


def test_more_characters_than_the_models_length_can_hold_are_never_tokenized() -> None:
    renderer = wrapped()
    with pytest.raises(ContextLengthError, match="shorten"):
        asyncio.run(ask(renderer, LENGTH_OF_MODEL * CHARACTERS + 1))
    assert not renderer.short and not renderer.tokenizer.texts


def test_far_more_tokens_than_the_models_length_are_found_piece_by_piece() -> None:
    renderer = wrapped(LONG_TEXT // 8, 64)
    most = LENGTHS * LONG_TEXT // 8
    with pytest.raises(ContextLengthError):
        asyncio.run(ask(renderer, LONG_TEXT * 7))
    assert max(renderer.tokenizer.texts) <= PIECE and sum(renderer.tokenizer.texts) <= most + 2 * PIECE
    with pytest.raises(ContextLengthError):
        asyncio.run(ask(renderer, 10**7))


def test_a_renderer_without_a_tokenizer_is_left_as_it_is() -> None:
    renderer = SimpleNamespace(tokenizer=None)
    TextTurns(5, lambda error: error).install(renderer)
    assert vars(renderer) == {"tokenizer": None}


def test_long_texts_hold_up_no_short_one_and_who_leaves_frees_the_place() -> None:
    async def test() -> None:
        renderer, goes_on, begun = wrapped(), threading.Event(), threading.Event()

        def wait(text: str) -> None:
            begun.set()
            assert goes_on.wait(60)

        renderer.tokenizer.at_call = wait
        first, left, last = (asyncio.create_task(ask(renderer, LONG_TEXT + n)) for n in (1, 2, 3))
        await asyncio.to_thread(begun.wait, 60)
        for _ in range(100):
            assert await ask(renderer, 100) == 100
        left.cancel()
        await asyncio.sleep(0)
        assert not first.done() and not last.done()
        goes_on.set()
        assert (await first, await last) == (LONG_TEXT + 1, LONG_TEXT + 3)
        assert renderer.tokenizer.texts == [LONG_TEXT + 1, LONG_TEXT + 3], "who left is not served"

    asyncio.run(test())


def test_a_client_that_leaves_while_its_text_is_tokenized_frees_the_turn() -> None:
    async def test() -> None:
        renderer = wrapped(LONG_TEXT // 8, 64)
        begun = threading.Event()
        renderer.tokenizer.at_call = lambda text: begun.set()
        leaver = asyncio.create_task(ask(renderer, LONG_TEXT * 7))
        await asyncio.to_thread(begun.wait, 60)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        seen = len(renderer.tokenizer.texts)
        with pytest.raises(ContextLengthError):
            await ask(renderer, LONG_TEXT * 7)
        pieces = LENGTHS * (LONG_TEXT // 8) // (PIECE - 128) + 1
        assert len(renderer.tokenizer.texts) <= seen + pieces + 1, "nothing of the first went on"

    asyncio.run(test())


# Over vLLM's own handlers


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("texts")
    model = tiny_server.build_model(folder / "model")
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(running(model, settings_of(folder / "store"), FakeEngine())) as world,
    ):
        yield Asker(portal, world)


@pytest.fixture
def tokenized(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the texts that the tokenizer gets."""
    tokenizer = asker.world.client.renderer.tokenizer
    found: list[int] = []
    inner = type(tokenizer).__call__

    def call(self: Any, text: Any, *args: Any, **options: Any) -> Any:
        found.append(len(text))
        return inner(self, text, *args, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", call)
    return found


@pytest.mark.parametrize("route", SELECTING, ids=name_of)
def test_no_route_tokenizes_more_than_the_models_length_can_mean(
    asker: Asker, route: Any, tokenized: list[int]
) -> None:
    most = LENGTH * asker.world.client.renderer.tokenizer.max_chars_per_token
    assert most < 20_000
    for body in REQUESTS[route.path]:
        response = asker.ask("POST", route.path, json={"model": "tiny"} | body)
        assert response.status_code in (200, 400), response.text
        if response.status_code == 400:
            refused(response, route, 400, response.json()["error"]["code"])
    assert max(tokenized, default=0) <= max(most, 16 * 1024)


@pytest.mark.parametrize("route", GENERATING, ids=name_of)
def test_a_text_that_is_too_long_says_so(asker: Asker, route: Any) -> None:
    content = next(name for name in ("prompt", "messages", "input") if name in REQUESTS[route.path][0])
    response = asker.ask("POST", route.path, json={"model": "tiny"} | REQUESTS[route.path][0])
    error = refused(response, route, 400, "context_length_exceeded")
    assert error["param"] == content
