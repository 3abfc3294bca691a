"""What a Ray Serve config file may give our application, without Ray."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from server.commands.ray import read_config, reason_of
from server.errors import StartError
from server.ray_serve.configuration import RayArguments
from server.ray_serve.needs import SWITCHES, check_switches

DEPLOY = Path(__file__).parents[2] / "deploy"
FILES = ("ray/demo.yaml", "kubernetes/ray/serve.yaml")


@pytest.mark.parametrize("file", FILES)
def test_the_files_to_start_from_are_right(file: str) -> None:
    config = read_config(DEPLOY / file)
    (application,) = config["applications"]
    assert application["import_path"] == "server.ray_serve.application:build" and application["route_prefix"] == "/"
    arguments = RayArguments(**application["args"])
    assert arguments.replicas > 1 and not arguments.model.startswith("~")
    assert arguments.command_line[:3] == [arguments.model, "--served-model-name", arguments.name]


def given(**more: Any) -> RayArguments:
    return RayArguments(**{"model": "m", "name": "n"} | more)


@pytest.mark.parametrize("flag", ["--api-key=alice=secret-0123456789", "--admin-key", "--admin_key=x", "--metrics-key"])
def test_no_secret_is_taken_from_a_file_that_rays_dashboard_shows(flag: str) -> None:
    with pytest.raises(ValidationError, match=r"expected no secret: .* set PERFT_(API_KEYS|ADMIN_KEY|METRICS_KEY)"):
        given(flags=[flag])


@pytest.mark.parametrize("flag", ["--host=0.0.0.0", "--port", "--uds=/s", "--ssl-certfile=c", "--served-model-name"])
def test_what_ray_decides_is_no_flag(flag: str) -> None:
    with pytest.raises(ValidationError, match="expected none: Ray Serve listens"):
        given(flags=[flag])


@pytest.mark.parametrize("wrong", [{"replica": 2}, {"replicas": 0}, {"model": ""}, {"device": "tpu"}, {"flags": "--x"}])
def test_anything_else_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        given(**wrong)


def test_ray_without_our_switches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SWITCHES.items():
        monkeypatch.setenv(name, value)
    check_switches()
    monkeypatch.delenv("RAY_SERVE_ENABLE_HA_PROXY")
    with pytest.raises(StartError, match="found Ray without RAY_SERVE_ENABLE_HA_PROXY=1, expected"):
        check_switches()


@pytest.mark.parametrize(
    "content", ["", "[]", "applications: []", "applications: [1]", "a: [", "applications: [{}, {}]"]
)
def test_a_file_that_is_none_says_so(content: str, tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(content)
    with pytest.raises(StartError, match=r"serve\.yaml: (expected a Ray Serve config file|cannot be read)"):
        read_config(path)
    with pytest.raises(StartError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_the_reason_is_ours_where_there_is_one() -> None:
    trace = "Traceback\n  File x\nserver.errors.StartError: --adapter-store: found nothing\nexpected a store"
    assert reason_of(trace) == "--adapter-store: found nothing\nexpected a store"
    assert reason_of("\n".join(map(str, range(50)))).splitlines() == [str(n) for n in range(38, 50)]


def test_switches_are_those_of_the_manifests() -> None:
    text = "".join(path.read_text() for path in (DEPLOY / "kubernetes").rglob("*.yaml"))
    assert all(name in text for name in SWITCHES) and yaml.safe_load((DEPLOY / FILES[0]).read_text())
