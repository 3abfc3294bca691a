"""`perft serve` on a tiny random model whose words are markup, and which can die and be started again."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from tests.server import tiny_server
from tests.server.processes import ServerProcess, free_port, launch, wait_until

KEYS = tiny_server.KEYS | {"metrics": "metrics-key-0123456789"}
MARKUP_EVERY = 5
SETTINGS = [
    *("--metrics-key", KEYS["metrics"], "--load-timeout-s", "3600", "--drain-timeout-s", "3600"),
    *("--shutdown-timeout-s", "5", "--engine-timeout-s", "3600", "--expert-sampling", "1"),
]


def word(number: int) -> str:
    """The text of a token: every few are markup that calls `owned` if a page takes it for its own."""
    if number % MARKUP_EVERY or number < MARKUP_EVERY:
        return f"t{number}"
    if number % (2 * MARKUP_EVERY):
        return f"<script>owned({number})</script>"
    return f"<img/src=x/onerror=owned({number})>"


def build_model(folder: Path) -> Path:
    """The tiny model of the tests, with those words."""
    tiny_server.build_model(folder)
    words = Tokenizer(models.WordLevel({word(i): i for i in range(tiny.VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: AddedToken(text, single_word=True) for name, text in tiny_server.SPECIAL_WORDS.items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokenizer.chat_template = tiny_server.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class RealServer:
    """A server that keeps its port and its store over restarts."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: ServerProcess | None = None
        self._starts = 0

    def start(self) -> None:
        """Start it and wait until it is ready."""
        self._starts += 1
        arguments = tiny_server.serve_arguments(
            self._model, self._folder / "store", self.port, *tiny_server.KEY_ARGUMENTS, *SETTINGS
        )
        log = self._folder / f"server-{self._starts}.log"
        self._process = launch(arguments, self.port, log, VLLM_LOGGING_LEVEL="WARNING")
        self._process.wait_until("/ready")

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None
        return self._process

    @contextmanager
    def engine_still(self) -> Iterator[None]:
        """No request comes to its end meanwhile; the engine may also die."""
        started = psutil.Process(self.process.process.pid).children(recursive=True)
        for each in started:
            each.suspend()
        try:
            yield
        finally:
            for each in started:
                with suppress(psutil.NoSuchProcess):
                    each.resume()

    def kill_engine(self) -> None:
        """The engine dies, and the server with it."""
        started = psutil.Process(self.process.process.pid).children(recursive=True)
        (engine,) = [each for each in started if "EngineCore" in " ".join([each.name(), *each.cmdline()])]
        engine.kill()
        wait_until(lambda: self.process.process.poll() is not None)

    def stop(self) -> None:
        if self._process is not None and self._process.process.poll() is None:
            self._process.process.send_signal(signal.SIGTERM)
            try:
                self._process.process.wait(120)
            finally:
                if self._process.process.poll() is None:
                    os.killpg(self._process.process.pid, signal.SIGKILL)


def adapter(folder: Path, seed: int, **changes: Any) -> Path:
    """An adapter of that model whose answers are its own."""
    return tiny_server.adapter(folder, seed, **changes)
