"""Single processes of a real server die or stand still: requests end with an error, probes say so, and a server that
cannot serve any more ends with a status that says so."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import psutil
import pytest

from server.hosting.run import EXIT_DIED
from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess, wait_until
from tests.server.streams import upload_version
from tests.server.tiny_server import BASE_NAME, TinyClient

ENGINE_TIMEOUT_S = 10
LENGTH = 8192
"""Tokens of the longest request, which nothing here finishes."""
MP = "vllm.v1.executor.multiproc_executor.MultiprocExecutor"
"""Runs the worker in a process of its own."""
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "t5 t6"}],
    "max_tokens": LENGTH - 100,
    "ignore_eos": True,
    "temperature": 0,
}
LONG = {
    "/v1/completions": {"prompt": [5], "max_tokens": LENGTH - 100, "ignore_eos": True},
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "t5 t6", "max_output_tokens": LENGTH - 100, "ignore_eos": True},
}
"""A request that runs until something ends it."""


@pytest.fixture
def own_server(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server that may be broken, with the test's own options and a base whose answers have no end."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    change_json(model / "config.json", max_position_embeddings=LENGTH, eos_token_id=None)
    change_json(model / "tokenizer_config.json", eos_token=None)
    (model / "generation_config.json").unlink(missing_ok=True)
    more = [*tiny_server.KEY_ARGUMENTS, "--max-model-len", str(LENGTH), *request.param]
    running = tiny_server.start(model, tmp_path / "store", *more)
    yield running
    if running.process.poll() is None:
        os.killpg(running.process.pid, signal.SIGKILL)


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def started_by(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def named(processes: list[psutil.Process], part: str) -> psutil.Process:
    """The process whose title has `part`."""
    (found,) = [each for each in processes if part in " ".join([each.name(), *each.cmdline()])]
    return found


def are_gone(processes: list[psutil.Process]) -> bool:
    return all(not each.is_running() or each.status() == psutil.STATUS_ZOMBIE for each in processes)


def ask(client: TinyClient, path: str, model: str, stream: bool, begun: Event) -> tuple[int, str]:
    """A long request: its status, and all of its body; `begun` once something of it came (or at once)."""
    body = LONG[path] | {"model": model, "stream": stream}
    if not stream:
        begun.set()
        answer = client.http.post(path, json=body)
        return answer.status_code, answer.text
    with client.http.stream("POST", path, json=body) as response:
        text = ""
        for part in response.iter_text():
            text += part
            if text.count("data:") > 3:
                begun.set()
        return response.status_code, text


def check_ended(path: str, stream: bool, answer: tuple[int, str]) -> None:
    """The request ended as one that the engine did not finish, in its route's dialect."""
    status, text = answer
    if not stream:
        assert status == 503, (path, answer)
        error = json.loads(text)["error"]
    else:
        assert status == 200, (path, answer)
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        (error,) = [event["error"] for event in events if event.get("error")]
        if path in ("/v1/messages", "/v1/responses"):
            assert any(event.get("type") == "error" for event in events), (path, text[-500:])
    assert "engine_unavailable" in json.dumps(error) or path == "/v1/messages", (path, error)
    assert 'finish_reason": "abort' not in text and 'finish_reason":"abort' not in text


def check_refused(answer: httpx.Response) -> str:
    """The message of a 503 in our shape."""
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "engine_unavailable" and set(error) >= {"message", "type", "param"}, error
    return str(error["message"])


def start_all(
    client: TinyClient, threads: ThreadPoolExecutor, models: list[str]
) -> dict[tuple[str, bool], Future[tuple[int, str]]]:
    """One long request of each route, streamed and not; returns once all are under way."""
    begun: list[Event] = []
    asked = {}
    for number, (path, stream) in enumerate((path, stream) for path in LONG for stream in (True, False)):
        begun.append(Event())
        asked[path, stream] = threads.submit(ask, client, path, models[number % len(models)], stream, begun[-1])
    assert all(each.wait(LIMIT_S) for each in begun)
    time.sleep(0.5)  # those that are not streamed reach the engine
    return asked


@pytest.mark.parametrize(
    "own_server", [("--engine-timeout-s", str(ENGINE_TIMEOUT_S), "--load-timeout-s", "6")], indirect=True
)
def test_an_engine_that_hangs_and_then_dies(own_server: ServerProcess, tmp_path: Path) -> None:
    client, late = TinyClient(own_server.url), TinyClient(own_server.url)
    models = [upload_version(client, "a", tiny_server.adapter(tmp_path / "a", 1)), BASE_NAME]
    upload_version(client, "b", tiny_server.adapter(tmp_path / "b", 2))
    children = started_by(own_server)
    core = named(children, "EngineCore")
    with ThreadPoolExecutor(16) as threads:
        running = start_all(client, threads, models)
        core.suspend()
        stopped = time.monotonic()
        loading = threads.submit(late.http.post, "/v1/completions", json=late.body("b", [5], 1))
        assert "answer" in check_refused(late.http.get("/ready"))
        print("ready said so after", time.monotonic() - stopped)
        assert late.http.get("/health").status_code == 200
        assert not [(asked, request.result()) for asked, request in running.items() if request.done()]
        said = check_refused(loading.result())
        assert "enlarge" not in said and "not answered" in said, said
        for (path, stream), request in running.items():
            check_ended(path, stream, request.result())
        print("requests ended after", time.monotonic() - stopped)
        check_refused(late.http.post("/v1/completions", json=late.body(BASE_NAME, [5], 1)))
        assert late.http.get("/v1/models").status_code == 200
        core.resume()
        wait_until(lambda: late.http.get("/ready").status_code == 200)
        assert len(late.complete("b", [5], 3).tokens) == 3

        running = start_all(client, threads, models)
        core.kill()
        killed = time.monotonic()
        for (path, stream), request in running.items():
            check_ended(path, stream, request.result())
        print("requests ended after", time.monotonic() - killed)
        assert "EngineCore" in check_refused(wait_for_death(late, "/ready"))
        check_refused(late.http.post("/v1/completions", json=late.body(BASE_NAME, [5], 1)))
    assert own_server.process.wait(LIMIT_S) == EXIT_DIED
    print("ended after", time.monotonic() - killed)
    wait_until(lambda: are_gone(children))
    log = own_server.log.read_text()
    said = f"the engine died: process EngineCore ({core.pid}) was killed by SIGKILL"
    assert f"{said}; the server ends" in log and f"the server ended by itself: {said}" in log, log[-3000:]


def wait_for_death(client: TinyClient, path: str) -> httpx.Response:
    """The answer once it says what died."""
    found: list[httpx.Response] = []

    def says() -> bool:
        found.append(client.http.get(path))
        return found[-1].status_code == 503 and "the engine died: " in found[-1].text

    wait_until(says)
    return found[-1]


@pytest.mark.parametrize("own_server", [("--distributed-executor-backend", MP)], indirect=True)
def test_a_worker_that_dies(own_server: ServerProcess) -> None:
    client = TinyClient(own_server.url)
    children = started_by(own_server)
    worker = named(children, "VLLM::Worker")
    begun = Event()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(ask, client, "/v1/completions", BASE_NAME, True, begun)
        assert begun.wait(LIMIT_S)
        worker.kill()
        check_ended("/v1/completions", True, running.result())
    assert own_server.process.wait(LIMIT_S) == EXIT_DIED, own_server.log.read_text()[-3000:]
    wait_until(lambda: are_gone(children))
    assert "the engine died: " in own_server.log.read_text()
