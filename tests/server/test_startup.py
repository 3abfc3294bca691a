"""Which starts are refused, and with which messages: names, folders, rows, flags, environment."""

import asyncio
import os
import sys
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from adapters.format.files import Limits
from adapters.store import FolderStore
from perft.engine.compatibility import FORBIDDEN_ENVIRONMENT
from perft.engine.plugin import KILL_SWITCH
from server.app.given_adapters import store_given_adapters
from server.app.plugin import create
from server.app.serve import _explain
from server.app.startup import check_status, warm_up
from server.engine.protocol import EngineStatus
from server.errors import StartError, StartFailedError
from server.hosting.arguments import WORKER_EXTENSION, make_parser, parse_arguments, prepare_arguments
from server.hosting.environment import load_plugins, prepare_environment
from server.hosting.given import NamedFolder, NamedUrl, check_folders, parse_named_folders
from server.hosting.process import banner
from server.hosting.run import Run
from server.settings.model import Settings
from server.settings.paths import check_paths, model_problem
from server.settings.sources import load
from server.sources.place import Place
from tests.server.desk import ADMIN, ROWS, Desk, on_a_loop, opened
from tests.server.fakes import BASE, FakeEngine, ready_status
from tests.server.partial_services import partial_services
from tests.synthetic import RANDOM_R, write_adapter

KEEP_ALIVE = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"


async def said_of(desk: Desk, *folders: NamedFolder) -> list[str]:
    """Store what was given at start; returns the lines that were printed."""
    with redirect_stdout(StringIO()) as out:
        await store_given_adapters(desk.registry, desk.service, list(folders))
    return out.getvalue().splitlines()


def named(folder: Path, name: str, seed: int, values: dict[str, Any] = RANDOM_R) -> NamedFolder:
    """`--adapter NAME=...` with a random adapter, beside the store."""
    return NamedFolder(name, write_adapter(folder.parent / f"{name}-{seed}", BASE, seed, values))


@on_a_loop
async def test_every_adapter_is_loaded_and_served_as_version_one(store: Path) -> None:
    async with opened(store) as desk:
        await store_given_adapters(
            desk.registry, desk.service, [named(store, name, seed) for seed, name in enumerate("ab")]
        )
        assert [desk.found(name).id for name in "ab"] == ["a@1", "b@1"] and len(desk.engine.on_host) == 2
        assert not list((store / "staging").iterdir())
        assert [(action, details["name"]) for action, details in desk.audit.records] == [
            ("upload", "a"), ("upload", "b"),
        ]  # fmt: skip


@on_a_loop
async def test_the_next_start_gives_the_same_versions(store: Path) -> None:
    folders = [named(store, "a", 1)]
    for _ in range(2):
        async with opened(store) as desk:
            await store_given_adapters(desk.registry, desk.service, folders)
            assert [version.id for version in desk.registry.versions("a")] == ["a@1"]


@on_a_loop
async def test_new_content_is_the_next_version_and_active_and_known_content_changes_nothing(store: Path) -> None:
    first, second, third = (named(store, "a", seed) for seed in (1, 2, 3))
    async with opened(store) as desk:
        assert await said_of(desk, first) == ["--adapter a: new content: it is version 1 now, the active one"]
        await desk.upload("off", 1)
        await desk.patch("off", active=None)
        assert await said_of(desk, second, named(store, "off", 1)) == [
            "--adapter a: new content: it is version 2 now, the active one",
            "--adapter off: nothing changed: this content is version 1 already, and none is active",
        ]
        assert desk.found("a").number == 2 and desk.registry.adapter("off", ADMIN).active is None
        await desk.patch("a", active=1)
    for _ in range(2):
        async with opened(store) as desk:
            nothing = "--adapter a: nothing changed: this content is version 2 already, and version 1 is active"
            assert await said_of(desk, second) == [nothing]
            assert desk.found("a").number == 1, "a restart undoes no rollback"
            assert not desk.audit.records
    async with opened(store) as desk:
        await said_of(desk, third, named(store, "off", 2))
        assert (desk.found("a").number, desk.found("off").number) == (3, 2)
        again = "--adapter a: nothing changed: this content is version 3 already, the active one"
        assert await said_of(desk, third) == [again]


@on_a_loop
async def test_content_that_was_deleted_is_new_again_and_as_private_as_it_was(store: Path) -> None:
    folder = named(store, "a", 1)
    async with opened(store) as desk:
        await desk.upload("a", 1)
        await desk.patch("a", allowed_keys=["alice"])
        await desk.service.delete("a", None, ADMIN)
        await desk.until_gone("a")
        (line,) = await said_of(desk, folder)
        assert line.endswith("it is version 2 now, the active one; for the keys alice, as this name was restricted")
        assert desk.found("a").number == 2 and desk.registry.adapter("a", ADMIN).allowed_keys == ["alice"]
        await desk.upload("a", 2)
        async with desk.request("a@2"):
            await desk.service.delete("a", 2, ADMIN)
            await said_of(desk, folder)
            assert desk.found("a").number == 4, "what drains is not what the name has"


@on_a_loop
async def test_content_of_another_base_stays_as_it_is_and_the_line_says_so(store: Path) -> None:
    folder = named(store, "a", 1)
    async with opened(store) as desk:
        await said_of(desk, folder)
    async with opened(store, base=replace(BASE, fingerprint="1" * 64)) as desk:
        (line,) = await said_of(desk, folder)
        assert "version 1 already, which cannot be served (base: found one of fingerprint 1111" in line
        assert [v.state for v in desk.registry.adapter("a", ADMIN).versions] == ["failed"]


@on_a_loop
async def test_a_name_of_which_only_a_delete_is_left_is_a_new_one(store: Path) -> None:
    async with opened(store) as desk:
        await desk.upload("a", 1)
        async with desk.request("a"):
            await desk.service.delete("a", None, ADMIN)
            await store_given_adapters(desk.registry, desk.service, [named(store, "a", 1)])
            assert desk.found("a").number == 2


@on_a_loop
async def test_the_banner_says_what_is_served_and_how_to_ask_it(store: Path) -> None:
    settings = load(Namespace(perft_api_keys=["a=first-key"]))
    async with opened(store) as desk:
        await desk.upload("poet")
        services = partial_services(
            registry=desk.registry, base_names=["base"], keys=settings.key_ring, settings=settings
        )
        for flags, url, curl in (
            ([], "http://127.0.0.1:8000/v1", "curl http://127.0.0.1:8000/v1"),
            (["--host", "::1", "--port", "81"], "http://[::1]:81/v1", "curl http://[::1]:81/v1"),
            (["--ssl-certfile", "/c"], "https://127.0.0.1:8000/v1", "curl https://127.0.0.1:8000/v1"),
            (["--uds", "/run/a b"], "/run/a b", "curl --unix-socket '/run/a b' http://localhost/v1"),
            (["--uds", "/s", "--ssl-certfile", "/c"], "/s", "curl --unix-socket /s https://localhost/v1"),
        ):
            args = make_parser().parse_args(["/m", *flags])
            said = banner(args, services, args.port)
            assert f"PERFT is serving at {url}: base 'base' and 1 adapter: poet. Try:" in said
            assert f"  {curl}/chat/completions -H 'Authorization: Bearer KEY' -H" in said
            assert '"model": "poet"' in said and "first-key" not in said
            page = f"The console, in a browser: {url.removesuffix('v1')}\n"
            assert said.endswith(page) if "--uds" not in flags else "console" not in said


def test_a_server_that_carries_the_operator_nowhere_does_not_start() -> None:
    with pytest.raises(StartError, match="no MoE layer: the worker's adapter manager is vLLM's"):
        check_status(EngineStatus(0, None, 0, 0, problem="the worker's adapter manager is vLLM's"))
    check_status(EngineStatus(2, BASE, 0, 0))


@on_a_loop
async def test_embedded_adapters_need_a_base_that_shows_its_top_k(store: Path) -> None:
    base = replace(BASE, embedded_problem="layer 0 runs a monolithic expert kernel that hides the base's top-k")
    values = {k: v for k, v in RANDOM_R.items() if k not in ("top_k", "renormalize")} | {"variant": "E"}
    folders = [named(store, "e", 0, values)]
    async with opened(store, base=base) as desk:
        with pytest.raises(StartError, match="monolithic expert kernel"):
            await store_given_adapters(desk.registry, desk.service, folders)
        assert not desk.registry.names() and not list((store / "staging").iterdir())
    async with opened(store) as desk:
        await store_given_adapters(desk.registry, desk.service, folders)
        assert desk.found("e")


@on_a_loop
async def test_adapters_may_exceed_the_pool_together_but_none_alone(store: Path) -> None:
    folders = [named(store, name, seed) for seed, name in enumerate("abc")]
    async with opened(store, FakeEngine(ready_status(rows_total=ROWS))) as desk:
        await store_given_adapters(desk.registry, desk.service, folders)
        for name in "abca":
            async with desk.request(name):
                assert desk.engine.rows_used == ROWS
    async with opened(store.with_name("other"), FakeEngine(ready_status(rows_total=ROWS - 1))) as desk:
        with pytest.raises(StartError, match=rf"too_many_rows: the adapter takes {ROWS} rows.*--pool-rows"):
            await store_given_adapters(desk.registry, desk.service, folders)


@on_a_loop
async def test_a_trainers_folder_may_be_given_as_it_is(store: Path) -> None:
    """Other files, checkpoints below, a byte order mark, and an adapter in the one subfolder."""
    given = named(store, "out", 0)
    for name in ("optimizer.pt", "training_args.bin", "adapter_model.bin", "README.md", ".DS_Store"):
        (given.folder / name).write_bytes(b"x")
    write_adapter(given.folder / "checkpoint-500", BASE, 7)
    config = given.folder / "adapter_config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    inner = named(store, "inner", 1)
    outer = NamedFolder("outer", store.parent / "only")
    (outer.folder / "runs").mkdir(parents=True)
    inner.folder.rename(outer.folder / "checkpoint-5")
    check_folders([given, outer], BASE, Limits())
    async with opened(store) as desk:
        await store_given_adapters(desk.registry, desk.service, [given, outer])
        assert desk.found("out") and desk.found("outer")
    (given.folder / "model.safetensors").write_bytes(b"x")
    write_adapter(outer.folder / "checkpoint-6", BASE, 8)
    with pytest.raises(StartError) as refused:
        check_folders([given, outer], BASE, Limits())
    assert "model.safetensors: not part of an adapter, but looks like more weights" in str(refused.value)
    assert "found adapters in several subfolders (checkpoint-5/, checkpoint-6/)" in str(refused.value)


@on_a_loop
async def test_everything_that_is_wrong_is_said_at_once(store: Path) -> None:
    engine = FakeEngine()
    engine.failures["prepare", "broken@1"] = 1
    gone = NamedFolder("gone", store.parent / "gone")
    folders = [named(store, "base", 1), gone, named(store, "broken", 2), named(store, "fine", 3)]
    async with opened(store, engine) as desk:
        with pytest.raises(StartError) as refused:
            await store_given_adapters(desk.registry, desk.service, folders)
        said = str(refused.value).splitlines()
        assert [line.partition("=")[0] for line in said] == [f"--adapter {n}" for n in ("base", "gone", "broken")]
        assert "the base model's served name" in said[0] and "No such file" in said[1] and "told to fail" in said[2]
        assert not list((store / "staging").iterdir())


def test_every_violation_of_every_folder_is_named(tmp_path: Path) -> None:
    for name in "ab":
        folder = write_adapter(tmp_path / name, BASE, 0)
        (folder / f"extra-{name}.safetensors").write_text("")
    (tmp_path / "b" / "adapter_config.json").write_text('{"variant": "X", "bottleneck": 0}')
    folders = [NamedFolder(name, tmp_path / name) for name in ("a", "b", "missing")]
    with pytest.raises(StartError) as refused:
        check_folders(folders, BASE, Limits())
    for part in (
        "extra-a.safetensors",
        "extra-b.safetensors",
        "variant: found 'X'",
        "bottleneck: found 0",
        "num_experts: missing",
    ):
        assert part in str(refused.value)
    assert "found no folder at" in str(refused.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["no-equals"], "expected NAME=PATH"),
        (["name="], "expected NAME=PATH"),
        (["Upper=/x"], "found the name 'Upper'"),
        (["../up=/x"], "found the name '../up'"),
        ([f"{'a' * 64}=/x"], "found the name"),
        (["na@1=/x"], "found the name 'na@1'"),
        (["base=/x"], "the base model's served name"),
        (["a=/x", "a=/y"], "given twice"),
    ],
)
def test_bad_adapter_flags_are_refused(given: list[str], expected: str) -> None:
    with pytest.raises(StartError, match=r"--adapter") as refused:
        parse_named_folders(given, ["base"])
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--api-server-count", "2"],
        ["--data-parallel-size", "2"],
        ["--pipeline-parallel-size", "2"],
        ["--enable-expert-parallel"],
        ["--enable-eplb"],
        ["--enable-dbo"],
        ["--ubatch-size", "2"],
        ["--decode-context-parallel-size", "2"],
        ["--prefill-context-parallel-size", "2"],
        ["--kv-offloading-size", "1"],
        ["--enable-sleep-mode"],
        ["--runner", "pooling"],
        ["--pool-rows", "0"],
        ["--additional-config", '{"perft": {}}'],
        ["--speculative-config", '{"method": "eagle3", "model": "/d", "num_speculative_tokens": 2}'],
        ["--speculative-config", '{"model": "/d", "num_speculative_tokens": 2}'],
        ["--kv-sharing-fast-prefill"],
        ["--headless"],
        ["--grpc"],
        ["--lora-modules", '{"name": "a", "path": "/x", "base_model_name": "another"}'],
        ["--lora-modules", '{"name": "a", "path": "/x", "is_3d_lora_weight": true}'],
        ["--lora-modules", '{"name": "a=b", "path": "/x"}'],
        ["--worker-extension-cls", "a.B"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_mode_that_is_not_tested_is_refused_by_name_before_anything_loads(flags: list[str]) -> None:
    args = make_parser().parse_args(["/no/such/model", *flags])
    with pytest.raises(StartError, match=flags[0]):
        prepare_arguments(args)


def test_what_perft_needs_of_vllm_is_filled_in_and_the_rest_is_left_alone() -> None:
    args = make_parser().parse_args(["/m", "--max-model-len", "99", "--pool-rows", "7", "--adapter", "a=/x"])
    prepare_arguments(args)
    assert args.model == "/m" and args.max_model_len == 99 and args.host == "127.0.0.1"
    assert args.enable_lora and args.enforce_eager and args.worker_extension_cls == WORKER_EXTENSION
    assert args.additional_config["perft"]["pool_rows"] == 7
    assert args.lora_target_modules is None, "only MoE layers are wrapped"


@pytest.mark.parametrize("flags", [[], ["--enforce-eager"]])
def test_on_a_gpu_the_callers_choice_of_eager_mode_stands(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    args = make_parser().parse_args(["/m", *flags])
    prepare_arguments(args)
    assert args.enforce_eager == bool(flags)


def test_drafts_from_n_grams_are_served() -> None:
    drafts = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'
    args = make_parser().parse_args(["/m", "--speculative-config", drafts])
    prepare_arguments(args)
    assert args.speculative_config["method"] == "ngram"


def test_adapters_are_given_by_a_flag_that_repeats_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    args = parse_arguments(["/m", "--adapter", "a=/x", "--port", "8123", "--adapter=b=/y.z"])
    assert args.adapter == ["a=/x", "b=/y.z"] and args.model_tag == "/m" and args.port == 8123
    assert "duplicate" not in caplog.text


@pytest.mark.parametrize("order", [["/m", "--config", "FILE"], ["--config", "FILE", "/m"]])
@pytest.mark.parametrize("listed", ["adapter: a=/x", "adapter: [a=/x]", "adapter: [a=/x, b=/y.z]"])
def test_adapters_of_vllms_config_file_come_before_those_of_the_flags(
    tmp_path: Path, order: list[str], listed: str
) -> None:
    path = tmp_path / "perft.yaml"
    path.write_text(f"port: 8123\napi_key: [one=key-of-one, two=key-of-two]\n{listed}\n")
    argv = [str(path) if item == "FILE" else item for item in order]
    of_file = ["a=/x", "b=/y.z"] if "b=" in listed else ["a=/x"]
    args = parse_arguments(argv)
    assert (args.adapter, args.model_tag, args.port) == (of_file, "/m", 8123)
    assert args.perft_api_keys == ["one=key-of-one", "two=key-of-two"]
    args = parse_arguments([*argv, "--adapter", "c=/z", "--api-key=three=key-of-three"])
    assert (args.adapter, args.model_tag) == ([*of_file, "c=/z"], "/m") and len(args.perft_api_keys) == 3


def test_vllms_lora_modules_are_adapters_given_at_start() -> None:
    modules = ["a=/x", '{"name": "b", "path": "hf://acme/poet@v1", "base_model_name": "served"}']
    args = parse_arguments(["/m", "--served-model-name", "served", "--adapter", "c=/z", "--lora-modules", *modules])
    prepare_arguments(args)
    assert args.adapter == ["c=/z", "a=/x", "b=hf://acme/poet@v1"]
    assert args.lora_modules is None, "vLLM must not load them as well"
    given = parse_named_folders(args.adapter, ["served"])
    assert given[:2] == [NamedFolder("c", Path("/z")), NamedFolder("a", Path("/x"))]
    assert given[2] == NamedUrl("b", Place("hf", ("acme", "poet"), "v1"))
    twice = parse_arguments(["/m", "--adapter", "a=/z", "--lora-modules", "a=/x"])
    prepare_arguments(twice)
    with pytest.raises(StartError, match="the name 'a' is given twice"):
        parse_named_folders(twice.adapter, ["/m"])


def test_the_model_itself_is_a_base_that_a_lora_module_may_name() -> None:
    module = '{"name": "a", "path": "/x", "base_model_name": "/m"}'
    args = parse_arguments(["/m", "--served-model-name", "served", "--lora-modules", module])
    prepare_arguments(args)
    assert args.adapter == ["a=/x"]


def test_places_that_adapters_are_given_by() -> None:
    given = ["a=file:///data/x", "b=s3://bucket/poet", "c=relative/folder", "d=hf://acme/poet"]
    places = [
        each.folder if isinstance(each, NamedFolder) else str(each.place) for each in parse_named_folders(given, [])
    ]
    assert places == [Path("/data/x"), "s3://bucket/poet", Path("relative/folder").absolute(), "hf://acme/poet"]
    with pytest.raises(StartError) as refused:
        parse_named_folders(["a=http://x/y", "b=hf://acme", "c=s3://bucket/../x"], [])
    assert str(refused.value).count("expected") == 3


def test_no_adapter_is_none() -> None:
    assert not parse_arguments(["/m"]).adapter


class WarmClient:
    """vLLM's client, as the warm-up asks it."""

    def __init__(self, max_logprobs: int) -> None:
        self.model_config = SimpleNamespace(max_logprobs=max_logprobs)
        self.asked: list[int | None] = []

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
        self.asked.append(params.logprobs)
        if params.logprobs and self.model_config.max_logprobs == 0:
            raise VLLMValidationError("Requested sample logprobs of 1, which is greater than max allowed: 0")
        yield


@pytest.mark.parametrize(("max_logprobs", "asked"), [(0, None), (1, 1), (20, 1), (-1, 1)])
def test_the_warm_up_asks_for_no_more_than_is_allowed(max_logprobs: int, asked: int | None) -> None:
    client: Any = WarmClient(max_logprobs)
    asyncio.run(warm_up(client))
    assert client.asked == [asked]


@pytest.mark.parametrize("error", [ValueError("found no tokens"), VLLMValidationError("found no tokens")])
def test_a_warm_up_that_is_refused_refuses_the_start(error: Exception) -> None:
    class Refusing(WarmClient):
        async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
            raise error
            yield

    client: Any = Refusing(1)
    with pytest.raises(StartError, match="found no tokens"):
        asyncio.run(warm_up(client))


def test_no_model_is_no_start() -> None:
    with pytest.raises(StartError, match="found no model to serve"):
        prepare_arguments(make_parser().parse_args([]))


def test_slots_are_many_for_perft_and_few_for_vllms_own_lora() -> None:
    for flags, slots in (([], 256), (["--max-loras", "3"], 3), (["--lora-target-modules", "qkv_proj"], 8)):
        args = make_parser().parse_args(["/m", *flags])
        prepare_arguments(args)
        assert args.max_loras == slots


@pytest.mark.parametrize("name", [*FORBIDDEN_ENVIRONMENT, KILL_SWITCH])
def test_a_switch_under_which_names_are_not_checked_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(StartError, match=f"{name}(=1)?: "):
        prepare_environment()


def test_other_plugins_stay_allowed_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "theirs")
    prepare_environment()
    assert os.environ["VLLM_PLUGINS"] == "theirs,perft,perft_server"


@pytest.mark.parametrize(("given", "expected"), [(None, 75), ("7", 7)])
def test_idle_connections_are_kept_longer_than_load_balancers_do(
    given: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own 5 s would reset a pooled connection just as it is used again; who names a time gets it."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop(KEEP_ALIVE, None)
    if given is not None:
        os.environ[KEEP_ALIVE] = given
    prepare_environment()
    assert envs.environment_variables[KEEP_ALIVE]() == expected, "as vLLM reads it for its HTTP server"


@pytest.mark.parametrize("module", ["perft.engine.plugin", "server.app.plugin"])
def test_a_plugin_that_cannot_be_imported_refuses_the_start(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StartError, match=module):
        load_plugins()


def test_a_plugin_that_is_not_installed_refuses_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.hosting.environment.entry_points", lambda group: [])
    with pytest.raises(StartError, match="not installed"):
        load_plugins()


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such", "~/no-such", "../no-such"])
def test_a_model_that_is_a_path_has_to_be_there(path: str) -> None:
    assert model_problem(path) == f"found nothing at {path}, expected the folder of a model"


@pytest.mark.parametrize("name", ["allenai/OLMoE-1B-7B-0924", "s3://bucket/model", "gpt2"])
def test_any_other_model_is_for_vllm_to_find(name: str, tmp_path: Path) -> None:
    assert model_problem(name) is model_problem(str(tmp_path)) is None


def test_a_store_that_is_taken_refuses_the_start_at_once(tmp_path: Path) -> None:
    chosen = Settings(adapter_store=tmp_path / "store")
    check_paths("gpt2", chosen)
    assert not (tmp_path / "store").exists()
    store = FolderStore.open(tmp_path / "store")
    with pytest.raises(StartError, match=f"is open in process {os.getpid()}, expected no other process"):
        check_paths("gpt2", chosen)
    store.close()
    check_paths("gpt2", chosen)
    FolderStore.open(tmp_path / "store").close()


def test_whatever_ends_a_start_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError("Repo id must be in the form 'repo_name' or 'namespace/repo_name'\nUse `repo_type`")
    with pytest.raises(StartFailedError, match=r"^vLLM ended: OSError: Repo id must be in the form .*'$"):
        _explain(error, Run(), Namespace(port=1, host="127.0.0.1"))
    assert "Use `repo_type`" in capsys.readouterr().err, "the whole of it comes before"


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::"])
def test_whoever_hosts_the_server_it_needs_an_admin_key_where_others_can_connect(host: str | None) -> None:
    """The command line refuses earlier; a host that parses no command line meets the same rule."""
    args = Namespace(host=host, uds=None, perft_host=Namespace(settings=Settings(), adapters=()))
    with pytest.raises(StartError, match="found no admin key on an address that others can reach"):
        asyncio.run(create().init_state(object(), object(), args))  # type: ignore[arg-type]


def test_a_server_without_a_host_does_not_start() -> None:
    with pytest.raises(StartError, match="is a part of `perft serve`; run that"):
        asyncio.run(create().init_state(object(), object(), Namespace()))  # type: ignore[arg-type]
