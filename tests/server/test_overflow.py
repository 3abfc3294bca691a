"""Four times more adapters than the pool holds: nobody starves, and every answer is right."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Event

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.streams import Case, clear_case, upload_version
from tests.server.tiny_server import POOL_ADAPTERS, ROWS, Answer, Samples, TinyClient

COUNT = 4 * POOL_ADAPTERS
REQUESTS = 100
AT_ONCE = 8
TOKENS = 12
WEIGHTS = {"zipf": [1 / rank for rank in range(1, COUNT + 1)], "uniform": [1.0] * COUNT}


@pytest.fixture(scope="module")
def alice(server: ServerProcess) -> Iterator[TinyClient]:
    client = TinyClient(server.url, tiny_server.KEYS["alice"])
    yield client
    client.close()


@pytest.fixture(scope="module")
def crowd(
    server: ServerProcess, alice: TinyClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Case]]:
    """Four adapters for every one that fits, and what each answers alone, by version."""
    folder, admin = tmp_path_factory.mktemp("crowd"), TinyClient(server.url)
    names = [f"crowd-{number}" for number in range(COUNT)]
    versions = [
        upload_version(admin, name, tiny_server.adapter(folder / name, seed)) for seed, name in enumerate(names)
    ]
    yield {version: clear_case(alice, [version], TOKENS, seed) for seed, version in enumerate(versions)}
    admin.remove(*names)
    admin.close()


def watch_rows(server: ServerProcess, ended: Event) -> list[float]:
    """Rows in use, looked at again and again, the last time at the end."""
    client, used = TinyClient(server.url), []
    while True:
        is_last = ended.wait(0.1)
        used.append(Samples.of(client.metrics()).total("perft_device_rows_used"))
        if is_last:
            break
    client.close()
    return used


@pytest.mark.parametrize("popularity", WEIGHTS)
def test_more_adapters_than_rows(
    server: ServerProcess, admin: TinyClient, alice: TinyClient, crowd: dict[str, Case], popularity: str
) -> None:
    asked = Random(1).choices(list(crowd), WEIGHTS[popularity], k=REQUESTS)
    assert len(set(asked)) > 2 * POOL_ADAPTERS
    before, ended = Samples.of(admin.metrics()), Event()

    def ask(version: str) -> Answer:
        return alice.complete(version, crowd[version].prompt, TOKENS)

    with ThreadPoolExecutor(AT_ONCE + 1) as threads:
        rows = threads.submit(watch_rows, server, ended)
        try:
            answers = [*threads.map(ask, asked)]
        finally:
            ended.set()
        most_rows = max(rows.result())
    during = Samples.of(admin.metrics()) - before

    assert [answer.model for answer in answers] == asked
    for version, answer in zip(asked, answers, strict=True):
        assert answer.tokens == crowd[version].answers[version], version
    assert during.total("perft_adapter_requests_total", finish_reason="length") == REQUESTS
    assert during.total("perft_adapter_evictions_total", tier="device") >= len(set(asked)) - POOL_ADAPTERS
    assert during.total("perft_step_load_bytes_total") == 0
    assert most_rows == POOL_ADAPTERS * ROWS
