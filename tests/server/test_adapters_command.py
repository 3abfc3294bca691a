"""`perft adapters` against a server that answers as docs/api.md says, on a real socket; odd answers by a transport."""

import io
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from safetensors.torch import save_file

from adapters.format.folder import read_folder
from adapters.identity import HashedFile, content_digest
from adapters.store import FolderStore
from server.api.error_responses import as_api_error
from server.client import commands, http
from server.client.commands import run
from server.client.connection import ClientError, Server
from server.client.http import AdaptersClient
from server.errors import AdapterNotFoundError, InvalidUploadError, ModelNotFoundError
from tests.server.adapter_api import KEY, AdapterApi, serving
from tests.server.fakes import BASE

CONFIG = {
    "peft_type": "PERFT", "format_version": 1, "base_model_name_or_path": "tiny", "variant": "S",
    "expert_type": "parallel", "bottleneck": 2, "num_experts": 1, "description": "says yes",
}  # fmt: skip


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterApi]:
    """A running server, named by the environment as a user would."""
    with serving(AdapterApi()) as running:
        monkeypatch.setenv("PERFT_SERVER", running.url)
        monkeypatch.setenv("PERFT_ADMIN_KEY", KEY)
        monkeypatch.setattr(commands, "POLL_S", 0.01)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A valid PERFT adapter for the tests' base."""
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    shapes = {"down_proj": (1, 2, 8), "up_proj": (1, 8, 2)}
    tensors = {f"layers.{layer}.{name}": torch.ones(shape) for layer in (0, 1) for name, shape in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def answering(answer: Callable[[httpx.Request], httpx.Response], address: str = "http://server:1") -> AdaptersClient:
    return AdaptersClient(Server(address, KEY, 5.0), transport=httpx.MockTransport(answer))


def test_push_sends_the_two_files_and_prints_the_version(api: AdapterApi, folder: Path, capsys: Any) -> None:
    assert run(["push", "yes", str(folder)]) == 0
    digest = read_folder(folder, BASE).digest
    assert capsys.readouterr().out == f"yes@1 {digest} (new, active)\n"
    sent = api.uploads[0]
    assert (sent["name"], sent["activate"]) == ("yes", "true")
    for field, name in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
        assert sent[field] == (name, (folder / name).read_bytes())


@pytest.mark.parametrize(
    ("allowed", "said"),
    [(None, "(new, active)"), ([], "for the admin key alone)"), (["ann", "bob"], "for ann, bob alone)")],
)
def test_push_says_who_alone_may_use_it(
    api: AdapterApi, folder: Path, capsys: Any, allowed: list[str] | None, said: str
) -> None:
    """Also where a deleted name had that restriction before."""
    api.add("yes", "0" * 64)
    api.adapters["yes"]["allowed_keys"] = allowed
    assert run(["push", "yes", str(folder)]) == 0
    assert capsys.readouterr().out.strip().endswith(said)


def test_push_of_what_is_there_says_so(api: AdapterApi, folder: Path, capsys: Any) -> None:
    api.add("yes", "0" * 64)
    assert run(["push", "yes", str(folder), "--no-activate"]) == 0
    assert run(["push", "yes", str(folder), "--no-activate"]) == 0
    digest = read_folder(folder, BASE).digest
    states = ["new, not active", "existing, not active"]
    assert capsys.readouterr().out.splitlines() == [f"yes@2 {digest} ({state})" for state in states]
    assert [sent["activate"] for sent in api.uploads] == ["false", "false"]


def test_push_of_peft_lora_knows_its_digest(api: AdapterApi, folder: Path, capsys: Any) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    assert run(["push", "lora", str(folder)]) == 0
    inner = [
        sha256((folder / name).read_bytes()).digest() for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert capsys.readouterr().out.split()[1] == sha256(b"".join(inner)).hexdigest()


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_push_of_an_archive_sends_it_as_it_is(api: AdapterApi, folder: Path, capsys: Any, ending: str) -> None:
    archive = folder.parent / f"adapter{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.write(folder / "adapter_config.json", "adapter_config.json")
    else:
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder / "adapter_config.json", "adapter_config.json")
    assert run(["push", "yes", str(archive)]) == 0
    assert api.uploads[0]["file"] == (f"adapter{ending}", archive.read_bytes())
    assert capsys.readouterr().out.startswith("yes@1 ")


def test_a_large_file_is_sent_in_pieces(
    api: AdapterApi, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    class Watched(HashedFile):
        def read(self, size: int | None = -1, /) -> bytes:
            block = super().read(size)
            read.append(len(block))
            return block

    monkeypatch.setattr(http, "HashedFile", Watched)
    with (folder / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(40_000_000)
    assert run(["push", "big", str(folder)]) == 0
    assert sum(read) > 40_000_000 and max(read) <= 1024 * 1024
    assert len(api.uploads[0]["weights"][1]) == 40_000_000


def test_a_refused_upload_names_every_violation(api: AdapterApi, folder: Path, capsys: Any) -> None:
    assert run(["push", "broken", str(folder)]) == 1
    shown = capsys.readouterr()
    expected = ["perft adapters: found 2 violations", "  - r: found 0", "  - x: \\x1b[2Jgone"]
    assert shown.err.splitlines() == expected and not shown.out


def test_the_first_violation_is_printed_once(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error = as_api_error(InvalidUploadError(["r: found 0: expected 1", "x: missing"])).body()
    with pytest.raises(ClientError) as refused:
        answering(lambda request: httpx.Response(400, json=error)).push("yes", folder, True)
    monkeypatch.setattr(AdaptersClient, "push", lambda *_: (_ for _ in ()).throw(refused.value))
    assert run(["push", "yes", str(folder)]) == 1
    expected = ["perft adapters: the adapter was rejected", "  - r: found 0: expected 1", "  - x: missing"]
    assert capsys.readouterr().err.splitlines() == expected


@pytest.mark.parametrize("ending", [".tar", ".tar.xz", ".TAR.bz2", ".txz", ".tar.zst", ".7z"])
def test_another_archive_is_told_to_be_compressed_anew(tmp_path: Path, capsys: Any, ending: str) -> None:
    (tmp_path / f"x{ending}").write_bytes(b"x")
    with pytest.raises(SystemExit, match="2"):
        run(["push", "yes", str(tmp_path / f"x{ending}")])
    assert "compress it as .zip or .tar.gz (tar -czf adapter.tar.gz ...)" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_key_is_refused_and_not_shown(api: AdapterApi, folder: Path, capsys: Any) -> None:
    assert run(["--key", "a-wrong-key", "push", "yes", str(folder)]) == 1
    shown = capsys.readouterr()
    assert "found no valid key" in shown.err and "PERFT_ADMIN_KEY" in shown.err
    assert "a-wrong-key" not in shown.out + shown.err


@pytest.mark.parametrize("key", ["with space", "with\nnewline", "umläut"])
def test_a_key_that_is_none_is_not_shown(capsys: Any, key: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(["list", "--key", key])
    assert key not in capsys.readouterr().err


def test_list_shows_every_page(api: AdapterApi, capsys: Any) -> None:
    for name in ("alpha", "beta", "gamma", "delta", "epsilon"):
        api.add(name, "1" * 64)
    api.add("beta", "2" * 64, last_used=None, requests_running=2, resident="disk", size_bytes=2_000_000_000)
    assert run(["list"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "NAME",
        "ACTIVE",
        "VERSIONS",
        "STATE",
        "RESIDENT",
        "SIZE",
        "ROWS",
        "RUNNING",
        "LAST",
        "USED",
    ]
    assert [row.split()[0] for row in rows] == ["alpha", "beta", "delta", "epsilon", "gamma"]
    assert rows[0].split() == ["alpha", "@1", "1", "ready", "device", "1.5", "MB", "272", "1", "2023-11-14T22:13:20Z"]
    assert rows[1].split() == ["beta", "@2", "2", "ready", "disk", "2.002", "GB", "272", "3", "2023-11-14T22:13:20Z"]


def test_list_as_json_is_the_api_s_list(api: AdapterApi, capsys: Any) -> None:
    for name in ("alpha", "beta", "gamma"):
        api.add(name, "1" * 64)
    assert run(["list", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    data = list(api.adapters.values())
    assert shown == {"object": "list", "data": data, "has_more": False, "next": None, "total": len(data)}


def test_list_of_one_shows_its_versions(api: AdapterApi, capsys: Any) -> None:
    api.add("alpha", "1" * 64, state="failed", reason="unread\x07able")
    api.add("alpha", "2" * 64)
    assert run(["list", "alpha"]) == 0
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("alpha@1          failed (unread\\x07able)  device")
    assert second.split()[:4] == ["alpha@2", "*", "ready", "device"] and second.endswith("PERFT R  " + "2" * 64)


def test_show_prints_one_version(api: AdapterApi, capsys: Any) -> None:
    api.add("alpha", "1" * 64)
    assert run(["show", "alpha@1"]) == 0
    assert json.loads(capsys.readouterr().out) == api.adapters["alpha"]["versions"][0]
    assert run(["show", "alpha@2"]) == 1
    assert "found no version 2 of alpha, expected one of its versions (1)" in capsys.readouterr().err


def test_activate_with_a_condition(api: AdapterApi, capsys: Any) -> None:
    api.add("alpha", "1" * 64)
    api.add("alpha", "2" * 64)
    assert run(["activate", "alpha", "1", "--if-active", "2"]) == 0
    assert run(["activate", "alpha", "2", "--if-active", "2"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "alpha@1 is active\n" and "found version 1 active" in shown.err
    assert api.patches == [{"active": 1, "if_active": 2}, {"active": 2, "if_active": 2}]


def test_activate_takes_the_version_behind_an_at_sign_too(api: AdapterApi, capsys: Any) -> None:
    for digest in "12":
        api.add("mal-1", digest * 64)
    assert run(["activate", "mal-1@1", "--if-active", "2"]) == 0
    assert api.patches == [{"active": 1, "if_active": 2}]
    assert run(["activate", "mal-1"]) == run(["activate", "mal-1@1", "2"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "mal-1@1 is active\n" and len(api.patches) == 1
    assert [
        line.partition(", expected one: perft adapters activate mal-1 VERSION")[:2] for line in shown.err.splitlines()
    ] == [
        (f"perft adapters: found {found}", ", expected one: perft adapters activate mal-1 VERSION")
        for found in ("no version", "two versions")
    ]


def test_rm_waits_until_it_is_gone(api: AdapterApi, capsys: Any) -> None:
    for digest in "12":
        api.add("alpha", digest * 64)
    assert run(["rm", "alpha@2"]) == 1
    assert run(["rm", "alpha@1", "--wait"]) == 0
    assert [version["version"] for version in api.adapters["alpha"]["versions"]] == [2]
    api.polls_to_drain = 3
    assert run(["rm", "alpha", "--wait"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "alpha@1 is gone\nalpha is gone\n" and "found version 2 active" in shown.err
    assert not api.adapters


def test_rm_does_not_wait_for_ever(api: AdapterApi, capsys: Any) -> None:
    api.add("alpha", "1" * 64)
    api.polls_to_drain = 10**9
    assert run(["rm", "alpha"]) == 0
    assert run(["rm", "alpha", "--wait", "--deadline", "0.1"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "alpha is being deleted\n" and "alpha@1 still draining after 0.1 s" in shown.err


@pytest.mark.parametrize(
    ("flags", "sent"),
    [([], None), (["--allowed-key", "ann"], ["ann"]), (["--allowed-key", "ann", "--allowed-key=bob"], ["ann", "bob"])],
)
def test_push_makes_an_adapter_private_from_its_first_moment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], sent: list[str] | None
) -> None:
    given: list[Any] = []

    def push(self: AdaptersClient, name: str, path: Path, activate: bool, allowed_keys: Any, *more: Any) -> Any:
        given.append(allowed_keys)
        raise ClientError("enough")

    monkeypatch.setattr(AdaptersClient, "push", push)
    assert run(["push", "yes", str(folder), *flags]) == 1 and given == [sent]
    monkeypatch.undo()
    bodies: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.read())
        return httpx.Response(400, json={"error": {"message": "m", "type": "t", "param": None, "code": "c"}})

    with pytest.raises(ClientError):
        answering(answer).push("yes", folder, True, sent)
    expected = b"" if sent is None else json.dumps(sent).encode()
    assert (b'name="allowed_keys"' in bodies[0]) is (sent is not None) and expected in bodies[0]


def test_verify_over_http_recomputes_the_digest(api: AdapterApi, folder: Path, capsys: Any) -> None:
    run(["push", "yes", str(folder)])
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    run(["push", "yes", str(folder)])
    capsys.readouterr()
    assert run(["verify", "yes"]) == 0
    assert [line.split()[::2] for line in capsys.readouterr().out.splitlines()] == [["yes@1", "ok"], ["yes@2", "ok"]]
    api.files["yes", 1]["weights"] += b"\0"
    assert run(["verify", "yes"]) == 1
    shown = capsys.readouterr()
    assert shown.out.startswith("yes@2 ") and "yes@1: its bytes have the digest" in shown.err
    assert run(["verify", "yes@2"]) == 0


def test_verify_of_a_folder_asks_no_server(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFT_SERVER", "http://127.0.0.1:9")
    store = FolderStore.open(folder.parent / "store")
    digest = read_folder(folder, BASE).digest
    staged = store.stage()
    shutil.copytree(folder, staged, dirs_exist_ok=True)
    store.add("yes", staged, digest, "PERFT", activate=True)
    store.close()
    assert run(["verify", str(folder.parent / "store")]) == 0
    with (store.folder(digest) / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"!")
    assert run(["verify", str(folder.parent / "store")]) == 1
    assert run(["verify", str(folder.parent / "nothing-there")]) == 1
    right, wrong, *_, last = capsys.readouterr().out.splitlines()
    assert right.endswith("every digest matches") and digest in wrong and last.endswith("1 problem found")


def test_pin_and_allow(api: AdapterApi, capsys: Any) -> None:
    api.add("alpha", "1" * 64)
    for arguments in (["pin", "alpha"], ["unpin", "alpha"], ["allow", "alpha", "ann", "bob"]):
        assert run(arguments) == 0
    assert run(["allow", "alpha", "--everyone"]) == run(["allow", "alpha", "--nobody"]) == 0
    assert api.patches[:3] == [{"pinned": True}, {"pinned": False}, {"allowed_keys": ["ann", "bob"]}]
    assert api.patches[3:] == [{"allowed_keys": None}, {"allowed_keys": []}]
    assert run(["allow", "alpha"]) == run(["allow", "alpha", "ann", "--everyone"]) == 2
    assert len(api.patches) == 5
    assert capsys.readouterr().out.splitlines()[2] == "alpha: selectable by ann, bob"


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["nothing"], ["push", "x"], ["push", "x", "/no/such/path"], ["list", "../etc"], ["list", "A"],
        ["activate", "x", "0"], ["activate", "x", "01"], ["activate", "x", "²"], ["rm", "x@"], ["rm", "x@-1"],
        ["verify"], ["list", "--server", "127.0.0.1:8000"], ["list", "--server", "ftp://x"],
        ["list", "--timeout", "nan"], ["list", "--server", "http://user:password@host"],
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_2(capsys: Any, arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(arguments)
    error = capsys.readouterr().err
    assert "usage: perft adapters" in error and "password@" not in error


def test_of_a_trainers_folder_the_two_files_are_sent(api: AdapterApi, folder: Path, capsys: Any) -> None:
    names = ["README.md", "optimizer.pt", "adapter_model.bin", "training_args.bin", "tokenizer.json", "a\x1b[2J"]
    for name in (*names, ".DS_Store"):
        (folder / name).touch()
    for step in (100, 200):
        (folder / f"checkpoint-{step}").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(folder / name, folder / f"checkpoint-{step}")
    api.notes = ["what the \x07 server says"]
    assert run(["push", "yes", str(folder)]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"yes@1 {read_folder_digest(folder)} (new, active)\n"
    first, second = shown.err.splitlines()
    assert first.startswith("note: only the two files of an adapter are taken, without ")
    assert all(name in first for name in (*names[:-1], "a\\x1b[2J", "checkpoint-100/", "checkpoint-200/"))
    assert second == "note: what the \\x07 server says" and ".DS_Store" not in first
    assert {"config", "weights"} <= api.uploads[0].keys() and "file" not in api.uploads[0]


def read_folder_digest(folder: Path) -> str:
    """The digest of the adapter in a folder with other files."""
    found = content_digest(
        (folder / "adapter_config.json").read_bytes(),
        sha256((folder / "adapter_model.safetensors").read_bytes()).digest(),
    )
    assert found is not None
    return found


def test_the_one_subfolder_with_an_adapter_is_pushed_and_named(api: AdapterApi, folder: Path, capsys: Any) -> None:
    outer = folder.parent / "out"
    shutil.copytree(folder, outer / "checkpoint-500")
    (outer / "runs").mkdir()
    assert run(["push", "yes", str(outer)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("yes@1 ") and "checkpoint-500/: the adapter was found in this subfolder" in shown.err
    shutil.copytree(folder, outer / "checkpoint-1000")
    with pytest.raises(SystemExit, match="2"):
        run(["push", "yes", str(outer)])
    error = capsys.readouterr().err
    assert "found adapters in several subfolders (checkpoint-1000/, checkpoint-500/): name one of them" in error
    assert len(api.uploads) == 1


def test_a_folder_that_is_no_adapter_is_not_sent(api: AdapterApi, folder: Path, capsys: Any) -> None:
    (folder / "model.safetensors").write_bytes(b"x")
    assert run(["push", "yes", str(folder)]) == 1
    assert "model.safetensors: not part of an adapter, but looks like more weights" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(SystemExit, match="2"):
        run(["push", "yes", str(folder)])
    error = capsys.readouterr().err
    assert "found no adapter_model.safetensors" in error and "a pickle" in error and "convert it" in error
    with pytest.raises(SystemExit, match="2"):
        run(["push", "yes", str(folder / "adapter_config.json")])
    assert f"give the folder that it is in, {folder}" in capsys.readouterr().err
    assert not api.uploads


@pytest.mark.parametrize("ending", ["/", "/v1", "/v1/", "//", "/v1//", "/v1/adapters", "//v1/adapters/"])
def test_the_address_may_have_the_start_of_a_route(api: AdapterApi, capsys: Any, ending: str) -> None:
    api.add("alpha", "1" * 64)
    assert run(["list", "--server", api.url + ending]) == 0
    assert run(["--server", api.url + ending, "show", "alpha"]) == 0
    assert "alpha@1" in capsys.readouterr().out


def test_an_address_with_another_route_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_api_error(ModelNotFoundError("v1/adapters")).body()
    client = AdaptersClient(
        Server("http://server:1/v1/models", KEY, 5.0),
        transport=httpx.MockTransport(lambda _: httpx.Response(404, json=model)),
    )
    expected = (
        "found no adapter routes at http://server:1/v1/models; expected --server (or PERFT_SERVER) to be the server's "
        "address, without a route behind it, such as http://server:1"
    )
    with pytest.raises(ClientError, match=re.escape(expected)):
        list(client.adapters())
    own = as_api_error(AdapterNotFoundError("x")).body()
    client = AdaptersClient(
        Server("http://server:1/llm", KEY, 5.0), transport=httpx.MockTransport(lambda _: httpx.Response(404, json=own))
    )
    with pytest.raises(ClientError, match=re.escape(own["error"]["message"])):
        client.adapter("x")


@pytest.mark.parametrize("prefix", ["", "/llm", "/v1x", "/v1/llm"])
def test_a_prefix_of_a_proxy_stays(prefix: str) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return httpx.Response(404)

    for ending in ("", "/", "/v1"):
        client = answering(answer, f"http://server:1{prefix}{ending}")
        with pytest.raises(ClientError):
            client.adapter("x")
    assert asked == [f"{prefix}/v1/adapters/x"] * 3


def test_a_pushed_archive_that_is_there_already_names_its_version(api: AdapterApi, folder: Path, capsys: Any) -> None:
    archive = folder.parent / "a.zip"
    archive.write_bytes(b"PK of any kind")
    assert run(["push", "yes", str(archive)]) == 0
    for digest in "12":
        api.add("yes", digest * 64)
    assert run(["push", "yes", str(archive), "--no-activate"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("yes@1 ") and first.endswith("(new, active)")
    assert second.startswith("yes@1 ") and second.endswith("(existing, not active)")


BUFFERED = {True: {"PYTHONUNBUFFERED": ""}, False: {"PYTHONUNBUFFERED": "1"}}
"""Whether Python writes an output at its end or at once."""


@pytest.mark.parametrize(
    "arguments", [["show", "alpha"], ["list", "alpha"], ["list", "--json"], ["push", "x", "a.zip"]]
)
@pytest.mark.parametrize("is_buffered", [True, False])
def test_output_that_nobody_reads_is_no_error(
    api: AdapterApi, tmp_path: Path, arguments: list[str], is_buffered: bool
) -> None:
    """As `| head` does, which ends before all is written."""
    for number in range(500):
        api.add("alpha", f"{number:064d}")
    (tmp_path / "a.zip").write_bytes(b"PK")
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from server.cli import main; main()", "adapters", *arguments]
    environment = os.environ | BUFFERED[is_buffered] | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("is_buffered", [True, False])
def test_output_that_cannot_be_written_is_an_error(api: AdapterApi, is_buffered: bool) -> None:
    command = [sys.executable, "-c", "from server.cli import main; main()", "adapters", "list"]
    environment = os.environ | BUFFERED[is_buffered]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


def test_no_server_is_one_clear_sentence(capsys: Any) -> None:
    assert run(["list", "--server", "http://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("perft adapters: found no server at http://127.0.0.1:9 (") and "perft serve" in line


def test_a_silent_server_and_a_broken_connection() -> None:
    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("timed out", request=request)

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("peer closed", request=request)

    with pytest.raises(ClientError, match="did not answer within 5 s; raise --timeout to wait longer"):
        answering(silent).adapter("x")
    with pytest.raises(ClientError, match="closed the connection early \\(peer closed\\)"):
        answering(broken).adapter("x")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (httpx.Response(502, text="<html>Bad gateway"), "the server answered 502 to GET /v1/adapters/x, without"),
        (httpx.Response(302, headers={"location": "http://elsewhere"}), "the server answered 302"),
        (httpx.Response(200, text="hello"), "with something other than AdapterObject"),
        (httpx.Response(200, json={"name": "x"}), "with something other than AdapterObject"),
        (
            httpx.Response(429, json={"error": {"message": "too many", "type": "t", "param": None, "code": "c"}},
                           headers={"retry-after": "7"}),
            "too many; retry after 7 s",
        ),
        (
            httpx.Response(403, json={"error": {"message": "no right", "type": "t", "param": None, "code": "c"}}),
            "no right; this key may not do that",
        ),
    ],
)  # fmt: skip
def test_answers_that_are_no_success(response: httpx.Response, expected: str) -> None:
    with pytest.raises(ClientError) as caught:
        answering(lambda request: response).adapter("x")
    assert expected in str(caught.value) and KEY not in str(caught.value)
    assert caught.value.status == response.status_code


def test_other_content_than_was_sent_is_an_error(folder: Path) -> None:
    other = AdapterApi()
    other.add("yes", "3" * 64)
    client = answering(lambda request: httpx.Response(201, json=other.adapters["yes"]))
    with pytest.raises(ClientError, match="but the server lists no version with it"):
        client.push("yes", folder, activate=True)


def test_an_archive_s_version_is_told_by_the_location(folder: Path) -> None:
    archive = folder.parent / "a.zip"
    archive.touch()
    held = AdapterApi()
    for digest in "123":
        held.add("yes", digest * 64)

    def pushed(activate: bool, status: int = 200, **headers: str) -> int | None:
        client = answering(lambda request: httpx.Response(status, json=held.adapters["yes"], headers=headers))
        version = client.push("yes", archive, activate).version
        return version.version if version else None

    assert pushed(False, location="/v1/adapters/yes/versions/1") == 1
    assert pushed(False) is None and pushed(True) == 3 and pushed(False, 201) == 3


def test_a_proxy_of_the_environment_does_not_stand_before_this_machine(
    api: AdapterApi, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert run(["list"]) == 0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, in one file with its key."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "perft")])
    now, names = datetime.now(UTC), x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1), [])
    made = made.add_extension(names, critical=False).add_extension(x509.BasicConstraints(True, 0), critical=True)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "authority.pem"
    path.write_bytes(made.sign(key, SHA256()).public_bytes(Encoding.PEM) + private)
    return path


@pytest.fixture
def tls_server(authority: Path) -> Iterator[str]:
    """The URL of a server with that certificate, which holds no adapters."""

    class NoAdapters(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"object": "list", "data": [], "has_more": false, "next": null}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority)
    with ThreadingHTTPServer(("127.0.0.1", 0), NoAdapters) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_certificate_is_trusted_by_a_flag_before_or_after_the_command(tls_server: str, authority: Path) -> None:
    assert run(["list", "--server", tls_server, "--cacert", str(authority)]) == 0
    assert run(["--cacert", str(authority), "list", "--server", tls_server]) == 0


def test_a_certificate_is_trusted_by_the_environment(
    tls_server: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    assert run(["list", "--server", tls_server]) == 0


def test_a_certificate_that_nobody_trusts_is_named_as_the_reason(tls_server: str, capsys: Any) -> None:
    assert run(["list", "--server", tls_server]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"perft adapters: found a certificate at {tls_server} that is not trusted (self-signed")
    assert "--cacert" in line and "found no server" not in line


def test_a_server_that_speaks_no_tls_is_named_as_the_reason(api: AdapterApi, capsys: Any) -> None:
    assert run(["list", "--server", api.url.replace("http:", "https:")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "found no TLS at https://127.0.0.1:" in line and "http://" in line


def test_certificates_that_cannot_be_read(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (tmp_path / "missing", folder / "adapter_config.json", folder):
        with pytest.raises(SystemExit, match="2"):
            run(["list", "--cacert", str(path)])
        assert f"found no readable certificates in {path}" in capsys.readouterr().err
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing"))
    assert run(["list", "--server", "https://127.0.0.1:9"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "SSL_CERT_FILE" in line


@pytest.mark.parametrize(
    "proxy", ["socks5://user:secret@127.0.0.1:9", "ftp://user:secret@127.0.0.1:9", "http://h:secret"]
)
def test_a_proxy_that_cannot_be_used_is_one_sentence(proxy: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert run(["list", "--server", "http://server.invalid"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "found a proxy in the environment" in line and "ALL_PROXY" in line and "secret" not in line


def test_a_file_is_hashed_from_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    with HashedFile(tmp_path / "x") as file:
        assert file.read(4) == b"0123"
        file.seek(0)
        while file.read(3):
            pass
        assert file.digest() == sha256(b"0123456789").digest()
        with pytest.raises(AssertionError):
            file.seek(1, io.SEEK_CUR)


@pytest.mark.parametrize("arguments", [["adapters", "--help"], ["adapters", "list", "--server", "http://127.0.0.1:9"]])
def test_the_command_starts_without_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from server.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, *sorted(m for m in ('torch', 'vllm') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ("0" if "--help" in arguments else "1")
