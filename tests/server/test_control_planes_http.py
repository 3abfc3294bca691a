"""`perft serve` with a real engine, driven as control planes drive vLLM."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.server import tiny_server
from tests.server.hub import running_hub
from tests.server.processes import ServerProcess, wait_until
from tests.server.tiny_server import BASE_NAME, KEY_ARGUMENTS, ROWS, Samples, TinyClient, long_prompt

PROMPT = long_prompt(3, 40)


@dataclass
class Driven:
    """The server, its folder of adapters, and the commit of the one on the hub."""

    server: ServerProcess
    client: TinyClient
    folder: Path
    commit: str

    def load(self, name: str, path: object, **more: bool) -> tuple[int, str]:
        body = {"lora_name": name, "lora_path": str(path), **more}
        response = self.client.http.post("/v1/load_lora_adapter", json=body)
        return response.status_code, response.text

    def models(self) -> set[str]:
        return {model["id"] for model in self.client.http.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def driven(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    folder = tmp_path_factory.mktemp("planes") / "adapters"
    folder.mkdir()
    for seed, name in enumerate(("given", "shared", "first", "second"), start=40):
        tiny_server.adapter(folder / name, seed)
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        commit = hub.add("acme/shared", folder / "shared", "v1")
        module = json.dumps({"name": "shared", "path": "hf://acme/shared@v1", "base_model_name": BASE_NAME})
        server = tiny_server.start(
            tiny_model, folder.parent / "store", *KEY_ARGUMENTS, "--adapter-source", str(folder),
            "--drain-timeout-s", "3600", "--load-timeout-s", "3600",
            "--lora-modules", f"given={folder / 'given'}", module,
        )  # fmt: skip
        client = TinyClient(server.url)
        yield Driven(server, client, folder, commit)
        client.close()
        server.stop()


def test_lora_modules_answer_from_the_start(driven: Driven) -> None:
    assert driven.models() == {BASE_NAME, "given", "shared"}
    for name in ("given", "shared"):
        assert driven.client.complete(name, PROMPT).model == f"{name}@1"
    said = [line for line in driven.server.log.read_text().splitlines() if line.startswith("--adapter ")]
    assert said == [
        f"--adapter {name}: new content: it is version 1 now, the active one" for name in ("given", "shared")
    ]
    audit = driven.folder.parent / "store.audit.jsonl"
    sources = [json.loads(line)["source"] for line in audit.read_text().splitlines()[:2]]
    assert sources == [str(driven.folder / "given"), f"hf://acme/shared@{driven.commit}"]


def test_a_plane_loads_replaces_and_unloads_while_requests_run(driven: Driven) -> None:
    client = driven.client
    for name in ("first", "second"):  # the same contents, uploaded: their tokens are what must come
        assert client.upload(f"uploaded-{name}", driven.folder / name).status_code == 201
    expected = {name: client.complete(f"uploaded-{name}", PROMPT, 64).tokens for name in ("first", "second")}
    assert expected["first"] != expected["second"] != client.complete(BASE_NAME, PROMPT, 64).tokens

    assert "poet" not in driven.models()
    assert driven.load("poet", driven.folder / "first") == (200, "Success: LoRA adapter 'poet' added successfully.")
    assert "poet" in driven.models() and client.complete("poet", PROMPT, 64).tokens == expected["first"]
    stream = client.stream("poet", PROMPT, 300)
    first_event = next(stream)
    assert driven.load("poet", driven.folder / "second")[0] == 400
    assert driven.load("poet", driven.folder / "second", load_inplace=True)[0] == 200
    assert client.complete("poet", PROMPT, 64).tokens == expected["second"]
    events = [first_event, *stream]
    assert {event["model"] for event in events} == {"poet@1"}
    tokens = [token for event in events for choice in event["choices"] for token in choice["token_ids"] or ()]
    assert tokens[:64] == expected["first"] and len(tokens) == 300, "the request kept the version it began with"

    samples = Samples.of(client.metrics())
    assert samples.total("vllm:lora_adapter_loaded", adapter_name="poet", level="gpu", pinned="false", rank="16") == 1
    assert samples.total("vllm:num_gpu_loaded_lora_adapters", model_name=BASE_NAME) >= 1
    free = samples.total("perft_device_rows_total") - samples.total("perft_device_rows_used")
    room = samples.total("vllm:max_gpu_lora_adapters") - samples.total("vllm:num_gpu_loaded_lora_adapters")
    assert room == free // ROWS, "equal contents share their rows, and versions that are not active take some"
    assert samples.total("perft_step_load_bytes_total") == 0
    answer = client.http.post("/v1/unload_lora_adapter", json={"lora_name": "poet"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'poet' removed successfully.")
    assert "poet" not in driven.models()
    assert client.refusal("POST", "/v1/completions", json=client.body("poet", PROMPT, 1)) == (404, "model_not_found")
    wait_until(lambda: client.http.get("/v1/adapters/poet").status_code == 404)
    client.remove("uploaded-first", "uploaded-second")


def test_the_running_app_has_the_two_routes_and_guards_them(driven: Driven) -> None:
    paths = driven.client.http.get("/openapi.json").json()["paths"]
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"} <= set(paths)
    assert not [path for path in paths if path.startswith("/adapters")]
    body = {"lora_name": "x", "lora_path": str(driven.folder / "first")}
    for key, status in ((None, 401), (tiny_server.KEYS["alice"], 403)):
        stranger = TinyClient(driven.server.url, key)
        assert stranger.http.post("/v1/load_lora_adapter", json=body).status_code == status
        stranger.close()
    assert driven.load("x", driven.folder.parent / "store")[0] == 403
