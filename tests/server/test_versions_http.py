"""Versions over HTTP on a real engine: activate, roll back, pin by number, delete with its deadline, unknown names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from json import dumps
from os import sysconf
from pathlib import Path
from random import Random
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server import tiny_server
from tests.server.processes import LIMIT_S, ServerProcess, wait_until
from tests.server.streams import Case, clear_case, upload_version, watch
from tests.server.tiny_server import KEYS, Samples, TinyClient

NAME = "versioned"
SHORT, LONG = 12, 200
PROMPT = [7, 8, 9]
MOST_TOKENS = 384 - len(PROMPT)
MADE_UP_NAMES, MADE_UP_LENGTH = 10_000, 2000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("versions")
    return [tiny_server.adapter(root / str(seed), seed=2000 + seed) for seed in range(3)]


@pytest.fixture
def versions(admin: TinyClient, folders: list[Path]) -> Iterator[list[str]]:
    """Two versions of NAME, the first one active."""
    yield [upload_version(admin, NAME, folder, activate=number == 0) for number, folder in enumerate(folders[:2])]
    admin.remove(NAME)


@pytest.fixture
def case(alice: TinyClient, versions: list[str]) -> Case:
    case = clear_case(alice, versions, SHORT, seed=1)
    assert case.answers[versions[0]] != case.answers[versions[1]]
    return case


def number_of(version: str) -> int:
    return int(version.partition("@")[2])


def test_activate_and_roll_back(admin: TinyClient, alice: TinyClient, versions: list[str], case: Case) -> None:
    for version in (versions[0], versions[1], versions[0]):
        assert admin.change(NAME, active=number_of(version))["active"] == number_of(version)
        answer = alice.complete(NAME, case.prompt, SHORT)
        assert (answer.model, answer.tokens) == (version, case.answers[version])


def test_a_pinned_version_answers_whatever_is_active(alice: TinyClient, versions: list[str], case: Case) -> None:
    for version in reversed(versions):
        answer = alice.complete(version, case.prompt, SHORT)
        assert (answer.model, answer.tokens) == (version, case.answers[version])


def test_activation_only_if_nobody_was_faster(admin: TinyClient, versions: list[str]) -> None:
    first, second = map(number_of, versions)
    change = {"active": second, "if_active": second}
    assert admin.refusal("PATCH", f"/v1/adapters/{NAME}", json=change) == (409, "active_changed")
    assert admin.adapter(NAME)["active"] == first
    assert admin.change(NAME, active=second, if_active=first)["active"] == second


def test_two_who_activate_at_once_do_not_both_win(admin: TinyClient, versions: list[str]) -> None:
    first, second = map(number_of, versions)

    def switch(_: int) -> int:
        change = {"active": second, "if_active": first}
        return admin.http.patch(f"/v1/adapters/{NAME}", json=change).status_code

    with ThreadPoolExecutor(4) as threads:
        assert sorted(threads.map(switch, range(4))) == [200, 409, 409, 409]


def test_the_same_content_again_is_the_same_version(
    admin: TinyClient, versions: list[str], folders: list[Path]
) -> None:
    response = admin.upload(NAME, folders[1], activate=True)
    assert response.status_code == 200
    assert response.json()["active"] == number_of(versions[1])
    assert [version["id"] for version in response.json()["versions"]] == versions


def test_the_active_one_of_several_is_not_deleted(admin: TinyClient, versions: list[str]) -> None:
    path = f"/v1/adapters/{NAME}/versions/{number_of(versions[0])}"
    assert admin.refusal("DELETE", path) == (409, "version_active")
    assert {version["state"] for version in admin.adapter(NAME)["versions"]} == {"ready"}


def test_a_name_made_again_gets_a_higher_number(
    admin: TinyClient, alice: TinyClient, versions: list[str], folders: list[Path]
) -> None:
    admin.remove(NAME)
    again = upload_version(admin, NAME, folders[0])
    assert number_of(again) > number_of(versions[1])
    for gone in versions:
        assert alice.refusal("POST", "/v1/completions", json=alice.body(gone, PROMPT, 1)) == (404, "model_not_found")


def test_a_stream_ends_on_its_version_when_that_is_no_longer_active_and_deleted(
    server: ServerProcess, admin: TinyClient, alice: TinyClient, versions: list[str]
) -> None:
    """Two of them: one has begun, one has only been let in when everything stops for as long as the changes take."""
    first, second = versions
    case = clear_case(alice, versions, LONG, seed=2)
    before, begun = ended(admin), Event()
    with ThreadPoolExecutor(2) as threads:
        streams = [threads.submit(watch, alice, NAME, case.prompt, LONG, begun)]
        assert begun.wait(LIMIT_S)
        with server.engine_stopped():
            streams.append(threads.submit(watch, alice, NAME, case.prompt, LONG))
            wait_until(lambda: ended(admin) - before + state(admin, first)[1] == 2)
            admin.change(NAME, active=number_of(second))
            assert admin.http.delete(f"/v1/adapters/{NAME}/versions/{number_of(first)}").status_code == 202
            assert state(admin, first) in {("draining", 1), ("draining", 2)}
            refused = alice.refusal("POST", "/v1/completions", json=alice.body(first, PROMPT, 1))
            assert refused == (404, "model_not_found")
        assert alice.complete(NAME, case.prompt, SHORT).model == second
        watched = [stream.result() for stream in streams]
    for each in watched:
        assert (each.error, each.finish_reason, each.model) == (None, "length", first)
        assert each.tokens == case.answers[first]
    wait_until(lambda: [version["id"] for version in admin.adapter(NAME)["versions"]] == [second])


def ended(admin: TinyClient) -> float:
    """How many requests of NAME have ended so far."""
    return Samples.of(admin.metrics()).total("perft_adapter_requests_total", adapter=NAME)


def state(admin: TinyClient, version: str) -> tuple[str, int]:
    """A version's state, and how many requests run on it."""
    (found,) = [each for each in admin.adapter(NAME)["versions"] if each["id"] == version]
    return found["state"], found["requests_running"]


@pytest.fixture
def hasty(tiny_model: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose deletes wait for a second only, and that takes requests of many sequences."""
    flags = [*tiny_server.KEY_ARGUMENTS, "--drain-timeout-s", "1", "--max-sequences", "640"]
    running = tiny_server.start(tiny_model, tmp_path / "store", *flags)
    yield running
    running.stop()


def test_what_outlives_a_deletes_deadline_ends_with_its_own_error(hasty: ServerProcess, folders: list[Path]) -> None:
    """Each asks for ten times more sequences than the engine runs at once, each as long as can be: for minutes."""
    admin, alice = TinyClient(hasty.url), TinyClient(hasty.url, KEYS["alice"])
    version = upload_version(admin, NAME, folders[0])
    endless: dict[str, Any] = {"temperature": 1, "seed": 1, "n": 640}
    body = alice.body(NAME, PROMPT, MOST_TOKENS, **endless)
    begun = Event()
    with ThreadPoolExecutor(2) as threads:
        stream = threads.submit(watch, alice, NAME, PROMPT, MOST_TOKENS, begun, **endless)
        assert begun.wait(LIMIT_S)
        whole = threads.submit(alice.http.post, "/v1/completions", json=body)
        wait_until(lambda: state(admin, version)[1] == 2)
        admin.remove(NAME)
        watched, response = stream.result(), whole.result()
    assert watched.error is not None and watched.error["code"] == "adapter_deleted"
    assert watched.model == version
    assert (response.status_code, response.json()["error"]["code"]) == (410, "adapter_deleted")
    admin.close()
    alice.close()


def test_names_that_were_made_up_leave_nothing_behind(server: ServerProcess) -> None:
    """Names of 2,000 characters: if one route kept them, the process would grow by twice what is allowed."""
    ask_made_up_names(server, 1000)
    before = resident_bytes(server)
    ask_made_up_names(server, MADE_UP_NAMES)
    assert resident_bytes(server) - before < MADE_UP_NAMES * MADE_UP_LENGTH / 10


def ask_made_up_names(server: ServerProcess, count: int) -> None:
    """Ask for names nobody has, on every route that takes one, over a few connections."""
    with ThreadPoolExecutor(4) as threads:
        for _ in threads.map(lambda seed: ask_some(server, count // 4), range(4)):
            pass


def ask_some(server: ServerProcess, count: int) -> None:
    random, address = Random(), urlsplit(server.url)
    assert address.hostname is not None
    connection = HTTPConnection(address.hostname, address.port)
    headers = {"Authorization": f"Bearer {KEYS['admin']}", "Content-Type": "application/json"}
    for number in range(count):
        name = "".join(random.choices("abcdefghij", k=10)) * (MADE_UP_LENGTH // 10)
        method, path, body = (
            ("POST", "/v1/completions", {"model": name, "prompt": "t5", "max_tokens": 1}),
            ("POST", "/v1/chat/completions", {"model": name, "messages": [], "max_tokens": 1}),
            ("POST", "/tokenize", {"model": f"{name}@1", "prompt": "t5"}),
            ("GET", f"/v1/adapters/{name}", None),
            ("GET", f"/v1/models/{name}", None),
        )[number % 5]
        connection.request(method, path, body and dumps(body), headers)
        response = connection.getresponse()
        assert response.status == 404, response.read()
        response.read()
    connection.close()


def resident_bytes(server: ServerProcess) -> int:
    """Memory of the process that answers HTTP."""
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * sysconf("SC_PAGE_SIZE")
