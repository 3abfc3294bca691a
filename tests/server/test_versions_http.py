"""Versions over HTTP on a real engine: activate, roll back, pin by number, delete with its deadline, unknown names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from json import dumps
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.server import tiny_server
from tests.server.processes import ServerProcess
from tests.server.streams import Case, Watched, clear_case, upload_version, watch
from tests.server.tiny_server import KEYS, TinyClient, wait_until

NAME = "versioned"
SHORT, LONG = 12, 200
PROMPT = [7, 8, 9]


@pytest.fixture
def alice(server: ServerProcess) -> Iterator[TinyClient]:
    client = TinyClient(server.url, KEYS["alice"])
    yield client
    client.close()


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


def running(admin: TinyClient, version: str) -> int:
    """Engine requests of a version now."""
    found: int = admin.adapter(NAME)["versions"][number_of(version) - number_of_first(admin)]["requests_running"]
    return found


def number_of_first(admin: TinyClient) -> int:
    number: int = admin.adapter(NAME)["versions"][0]["version"]
    return number
