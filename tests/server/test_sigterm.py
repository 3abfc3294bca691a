"""SIGTERM (or SIGHUP) while streams run: each of them ends well, nothing new begins, and no process is left."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess, processes_of, unfinished_upload, wait_until
from tests.server.streams import upload_version, watch
from tests.server.tiny_server import BASE_NAME, KEYS, TinyClient

STREAMS = 8
TOKENS = 300


@pytest.fixture
def own_server(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    """A server that may be ended, with the test's own options."""
    running = tiny_server.start(tiny_model, tmp_path / "store", *tiny_server.KEY_ARGUMENTS, *request.param)
    yield running
    if running.process.poll() is None:
        os.killpg(running.process.pid, signal.SIGKILL)


SLOW_UPLOAD = ("--upload-timeout-s", "3600", "--upload-idle-timeout-s", "3600")


@pytest.mark.parametrize("own_server", [("--shutdown-timeout-s", "3600", *SLOW_UPLOAD)], indirect=True)
def test_streams_end_well_and_nothing_is_left(own_server: ServerProcess, tmp_path: Path) -> None:
    client, late = TinyClient(own_server.url), TinyClient(own_server.url)
    names = [f"ending-{number}" for number in range(3)]
    versions = [upload_version(client, n, tiny_server.adapter(tmp_path / n, seed)) for seed, n in enumerate(names)]
    models = [[*versions, BASE_NAME][number % 4] for number in range(STREAMS)]
    wait_until(lambda: late.http.get("/ready").status_code == 200)
    assert len(processes_of(own_server)) > 1
    begun = [Event() for _ in range(STREAMS)]
    store = own_server.log.parent / "store"
    with ThreadPoolExecutor(STREAMS) as threads:
        # Of this the server waits for the end, however soon the streams end.
        with unfinished_upload(own_server.port, KEYS["admin"], store):
            streams = [
                threads.submit(watch, client, model, [5 + number], TOKENS, begun[number])
                for number, model in enumerate(models)
            ]
            assert all(each.wait(LIMIT_S) for each in begun)
            own_server.process.send_signal(signal.SIGTERM)
            refused = refusal_while_draining(late)
        watched = [stream.result() for stream in streams]
    assert refused == (503, "engine_unavailable")
    assert [(w.error, w.finish_reason, len(w.tokens)) for w in watched] == [(None, "length", TOKENS)] * STREAMS
    assert [w.model for w in watched] == models
    assert own_server.process.wait(LIMIT_S) == 0, own_server.log.read_text()[-3000:]
    wait_until(lambda: processes_of(own_server) == {})


@pytest.mark.parametrize("own_server", [("--shutdown-timeout-s", "1", *SLOW_UPLOAD)], indirect=True)
def test_an_upload_that_does_not_come_keeps_no_server_from_ending(own_server: ServerProcess) -> None:
    """SIGHUP, the end of the terminal, does the same as SIGTERM."""
    with unfinished_upload(own_server.port, KEYS["admin"], own_server.log.parent / "store"):
        own_server.process.send_signal(signal.SIGHUP)
        assert own_server.process.wait(LIMIT_S) == 0, own_server.log.read_text()[-3000:]
    wait_until(lambda: processes_of(own_server) == {})


def refusal_while_draining(client: TinyClient) -> tuple[int, str]:
    """How a new request is refused once the signal was noticed; those before that are answered as ever."""
    while True:
        response = client.http.post("/v1/completions", json=client.body(BASE_NAME, [5], 1))
        if response.status_code != 200:
            return response.status_code, response.json()["error"]["code"]
